"""Sources of a blend: a dataclass for each kind, with the keys of this kind alone, and the short forms of all.

What becomes of a source is in `nemo_llm.data.sources`, where each kind has a class of its own.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from nemo_llm.assets import ASSET_PREFIX, asset_names, resolve_path
from nemo_llm.config.sections.fields import NonEmptyStr, NonNegativeFloat, PathStr, PositiveInt, Section, TaggedBy
from nemo_llm.errors import InputError, Problem

SHORT_FORMS = {"prefix": "indexed", "text": "text", "chat": "chat", "labelled": "labelled", "mock": "mock"}
"""Kind of a source by the key that says it in one word: ``{name: x, chat: FILE}`` is ``kind: chat, path: FILE``."""
_RESERVED = {"pairs": "pairs", "prompts": "prompts"}  # for kinds that there are not yet


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSection(Section, ABC):
    """What every kind of source has; a kind adds its own keys."""

    packs: ClassVar[bool]
    """Whether samples hold its documents whole, each seeing itself alone, rather than as text that runs on."""

    name: NonEmptyStr
    """The source's name in logs; it seeds the order, so that moved files keep theirs."""
    kind: str
    weight: NonNegativeFloat | None = None
    """Share of this source, relative to the other weights (``data.blend_by`` says of what); null for all: by size."""

    @property
    def identity(self) -> str:
        """What the source reads, in words: every key but its name and weight. A resumed run may not change it."""
        own = [field.name for field in fields(self) if field.name not in ("name", "weight")]
        return ", ".join(f"{name} {getattr(self, name)}" for name in own)

    @abstractmethod
    def check(self, key: str) -> Iterator[Problem]:
        """What keeps the source, which stands at ``key``, from being opened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource(SourceSection):
    """A source that is a file, a folder, a glob or ``asset:NAME``."""

    path: PathStr

    def check(self, key: str) -> Iterator[Problem]:
        """The files exist."""
        yield from missing_path(f"{key}.path", self.path, "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedSource(SourceSection):
    """Tokens that ``tools/index_dataset.py`` has written."""

    packs = False
    kind: Literal["indexed"] = "indexed"
    path: PathStr
    """Path of the dataset without ``.bin``/``.idx``."""

    def check(self, key: str) -> Iterator[Problem]:
        """Both files exist."""
        path = self.path
        missing = [suffix for suffix in (".bin", ".idx") if not Path(path + suffix).expanduser().is_file()]
        if missing and path.endswith((".bin", ".idx")):
            yield Problem(f"{key}.path", path, "must be the path without .bin or .idx", f"write {path[:-4]}")
        elif missing:
            files = " and ".join(path + suffix for suffix in missing)
            fix = "correct the path, or write the files with tools/index_dataset.py"
            if Path(path).expanduser().exists() or glob(str(Path(path).expanduser())):
                fix = f"name raw text as {{name: mine, text: {path}}}"
            yield Problem(f"{key}.path", path, f"there is no {files}", fix)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource(FileSource):
    """Raw text, tokenised once into the cache."""

    packs = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSource(FileSource):
    """Conversations: JSON lines or Parquet; ``data.chat`` says how they are read."""

    packs = True
    kind: Literal["chat"] = "chat"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSource(FileSource):
    """Texts with labels: JSON lines or Parquet; ``data.labelled`` says how they are read."""

    packs = True
    kind: Literal["labelled"] = "labelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class MockSource(SourceSection):
    """Random documents, for benchmarks and layout tests; the same for every machine."""

    packs = False
    kind: Literal["mock"] = "mock"
    num_documents: PositiveInt
    """Number of documents in one epoch."""
    mean_document_length: Annotated[int, Ge(2)]
    """Mean length in tokens, at least one and the end of the document; lengths follow an exponential law."""

    def check(self, key: str) -> Iterator[Problem]:  # noqa: ARG002 (there is no file that could be missing)
        """Nothing."""
        return iter(())


BlendSource = Annotated[
    IndexedSource | TextSource | ChatSource | LabelledSource | MockSource, TaggedBy("kind", tuple(SHORT_FORMS))
]
Blend = tuple[BlendSource, ...]


def missing_path(key: str, path: str, assets: str) -> Iterator[Problem]:
    """The problem of a path, a glob or an asset of the kind ``assets`` that is not there."""
    from nemo_llm.config.compose.catalog import nearest  # which knows this module

    try:
        found = resolve_path(path, assets)
    except InputError:
        names = [f"{ASSET_PREFIX}{name}" for name in asset_names(assets)]
        meant = nearest(path, names)
        fix = f"did you mean {meant}?" if meant else f"write one of {', '.join(names)}, or a path"
        yield Problem(key, path, "is not shipped with the package", fix)
        return
    if not found.exists() and not (assets == "text" and glob(str(found))):
        yield Problem(key, path, "there is no such file or folder", "correct the path")


def with_long_forms(data: Mapping[str, Any]) -> dict[str, Any]:
    """The ``data`` section with every source in its long form. What is no source stays, for the decoder to refuse."""
    found = dict(data)
    if "blend" in found:
        found["blend"] = _long_blend(found["blend"])
    if isinstance(found.get("validation"), Mapping):
        found["validation"] = {name: _long_blend(blend) for name, blend in found["validation"].items()}
    return found


def _long_blend(blend: Any) -> Any:
    if not isinstance(blend, list | tuple):
        return blend
    if blend and all(isinstance(item, str | int | float) for item in blend):
        return _flat_entries(list(blend))
    return [_long_entry(item) if isinstance(item, Mapping) else item for item in blend]


def _long_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with ``kind`` and its own keys. Earlier versions saved every short form, all but one of them null."""
    kinds = SHORT_FORMS | _RESERVED
    given = {key: value for key, value in entry.items() if key not in kinds or value is not None}
    short = next((key for key in given if key in kinds), None)
    if short is None or "kind" in given:
        return given
    kind, value = kinds[short], given[short]
    own = value if kind == "mock" else {"path": value}
    if not isinstance(own, Mapping) or own.keys() & {"kind", *given}:
        return {"kind": kind, **given}
    return {"kind": kind, **own, **{key: value for key, value in given.items() if key != short}}


def _flat_entries(items: list[Any]) -> list[dict[str, Any]]:
    """Megatron's ``[weight, prefix, ...]`` or ``[prefix, ...]``, as entries.

    The name seeds a source's order, so it is the prefix's last part where those differ: data may move elsewhere.
    """
    numbers, weights = [_as_number(item) for item in items], [None] * len(items)
    if any(isinstance(number, float) for number in numbers):
        weights, items = numbers[::2], items[1::2] + [None] * (len(items) % 2)
    prefixes = [os.path.expanduser(str(item)) for item in items]
    names = [prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in prefixes]
    names = names if len(set(names)) == len(names) else prefixes
    return [
        {"name": name, "kind": "indexed", "weight": weight, "path": item}
        for name, weight, item in zip(names, weights, items, strict=True)
    ]


def _as_number(item: Any) -> Any:
    try:
        return str(item) if isinstance(item, bool) else float(item)
    except (TypeError, ValueError):
        return item
