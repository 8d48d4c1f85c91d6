"""What became of each key of another project's configuration."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ImportRow:
    """What became of one foreign key."""

    key: str
    value: Any
    became: str
    """``mapped``; ``default`` (the file says nothing, and this is what holds there); ``left`` (nothing to set here); or
    ``unmapped`` (it means something that was not taken over)."""
    text: str

    def __str__(self) -> str:
        return f"{self.became:8}  {self.key} = {short(self.value)}  ->  {self.text}"


@dataclass(slots=True)
class Imported:
    """Keys of ours, and a row for each foreign key."""

    keys: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    rows: list[ImportRow] = field(default_factory=list)


def short(value: Any) -> str:
    """A value as a row shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
