"""What every configuration section shares: the strict base class and the ranges that fields may have."""

import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from annotated_types import Ge, Gt, Interval, MinLen


class Section:
    """Base of the configuration dataclasses: the decoder refuses keys that are not fields, and numbers without end."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}


Scalar = bool | int | float | str | None

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
DropoutFraction = Annotated[float, Interval(ge=0, lt=1)]
NonEmptyStr = Annotated[str, MinLen(1)]


@dataclass(frozen=True)
class TaggedBy:
    """Marks a union of sections of which the value of one key chooses: every other key is that section's alone."""

    key: str
    short_forms: tuple[str, ...] = ()
    """Keys that stand for this one and others, and are written out before anything is decoded."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The decoder's schema; imported here, since ``--help`` does without pydantic."""
        from pydantic_core import core_schema

        # Named so in the decoder's errors, since the value alone may be a key of the section as well.
        members = {tag: member for member in get_args(source) for tag in self.tags(member)}
        choices = {f"{self.key} {tag}": handler.generate_schema(member) for tag, member in members.items()}

        def chosen(value: Any) -> str | None:
            return f"{self.key} {value[self.key]}" if isinstance(value, dict) and self.key in value else None

        return core_schema.tagged_union_schema(choices, chosen)

    def tags(self, member: type) -> tuple[str, ...]:
        """Values of the key that choose a member of the union."""
        return get_args(get_type_hints(member)[self.key])


class HomeExpanded:
    """Marks a text as a path, or as a name that may be one: a ``~`` at its beginning becomes the home folder."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The decoder's schema; imported here, since ``--help`` does without pydantic."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(expand_home, handler(source))


def expand_home(path: str) -> str:
    """`path` with the home folder in place of ``~`` or ``~user``.

    Raises:
        ValueError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no user of this name; write ./{path} for a file or folder of this name")
    return expanded


PathStr = Annotated[str, MinLen(1), HomeExpanded()]
