"""What there is to configure: the folder of YAML files, the groups in it, and every key that `RunConfig` knows.

Imports neither Hydra nor pydantic, so that ``--help`` is quick.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen

from nemo_llm.config.sections.fields import TaggedBy
from nemo_llm.config.sections.run import RunConfig

# Groups of conf/ that hold parts of other files and are never chosen by themselves.
_PART_FOLDERS = ("family",)
# Groups of the tools, which a training run does not have.
TOOL_GROUPS = ("data_prep",)


def conf_dir() -> Path:
    """Folder of the shipped YAML: inside the package when installed, beside it in a source tree.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} nor beside it: the installation is incomplete")


def group_choices(folders: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Names that can be chosen in each group (``model``, ``optim/sched``, ...), over all configuration folders."""
    choices: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            parent = path.parent.relative_to(folder)
            if parent.parts and not set(parent.parts) & {*_PART_FOLDERS, *TOOL_GROUPS}:
                choices.setdefault(parent.as_posix(), set()).add(path.stem)
    return {group: tuple(sorted(names)) for group, names in sorted(choices.items())}


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key of the configuration: its annotation, and whether it may be left out of a mapping."""

    annotation: Any
    optional: bool

    @property
    def description(self) -> str:
        """What the key takes, in words: ``a whole number of at least 1, or null``."""
        return describe_type(self.annotation)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """Names that a key of fixed choices takes; empty for any other key."""
    literals = [member for member in union_members(annotation) if get_origin(member) is Literal]
    return tuple(str(name) for literal in literals for name in get_args(literal))


def annotation_at(path: Sequence[str | int], section: type = RunConfig) -> Any:
    """Annotation of the value at `path` (field names, list places, mapping keys), or None where nothing is known."""
    candidates: list[Any] = [section]
    for part in path:
        candidates = [found for member in candidates for found in _descend(member, part)]
    return candidates[0] if candidates else None


def _descend(annotation: Any, part: str | int) -> list[Any]:
    found = []
    for member in union_members(annotation):
        origin, args = get_origin(member), get_args(member)
        if dataclasses.is_dataclass(member) and isinstance(part, str):
            hints = get_type_hints(member, include_extras=True)
            found += [hints[part]] if part in hints else []
        elif origin in (list, tuple) and isinstance(part, int):
            found.append(args[0])
        elif origin is dict and isinstance(part, str):
            found.append(args[1])
    return found


def tag_of(annotation: Any) -> TaggedBy | None:
    """What tells the members of a union of sections apart, or None where there is no such union."""
    if isinstance(annotation, TaggedBy):
        return annotation
    parts = get_args(annotation) if get_origin(annotation) in (Annotated, Union, types.UnionType) else ()
    return next(filter(None, map(tag_of, parts)), None)


def known_keys(section: type = RunConfig, prefix: str = "") -> dict[str, KeyInfo]:
    """Every dotted key below `section`, sections themselves included; items of a list count as the list's keys.

    A key of several members of a union takes what any of them takes.
    """
    keys: dict[str, KeyInfo] = {}
    hints = get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        keys[key] = KeyInfo(hints[field.name], has_default)
        items = [
            get_args(member)[0] if get_origin(member) in (list, tuple) else member
            for member in union_members(hints[field.name])
        ]
        for item in (one for several in items for one in union_members(several)):
            if isinstance(item, type) and dataclasses.is_dataclass(item):
                for name, info in known_keys(item, f"{key}.").items():
                    before = keys.get(name, info)
                    keys[name] = KeyInfo(before.annotation | info.annotation, before.optional or info.optional)
    return keys


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was probably meant to be, or None."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def nearest_key(key: str, candidates: Iterable[str]) -> str | None:
    """The known dotted key that `key` was probably meant to be: the same section first, then any section's."""
    candidates = list(candidates)
    section, _, leaf = key.rpartition(".")
    siblings = [name for name in candidates if name.rpartition(".")[0] == section]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(candidates)}
    if (sibling := nearest(key, siblings)) and nearest(leaf, [sibling.rpartition(".")[2]]):
        return sibling
    if leaf in by_leaf:
        return by_leaf[leaf]
    whole, elsewhere = nearest(key, candidates), nearest(leaf, by_leaf)
    if elsewhere is not None:
        return by_leaf[elsewhere]
    return whole


def describe_type(annotation: Any) -> str:
    """An annotation in the words that error messages and ``--help`` use."""
    members = union_members(annotation)
    words = [_describe_member(member) for member in members if member is not type(None) and not choices_of(member)]
    if choices := choices_of(annotation):
        words.insert(0, "one of " + ", ".join(choices))
    text = " or ".join(dict.fromkeys(words))
    if type(None) not in members:
        return text
    return f"{text}, or null" if text else "null"


def union_members(annotation: Any) -> tuple[Any, ...]:
    """What a value may be, each by itself: the members of a union, those of unions in it included."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in union_members(part))
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, types.UnionType):
        return union_members(get_args(annotation)[0])
    return (annotation,)


_PLAIN_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "any value",
}


def _describe_member(member: Any) -> str:
    origin, args = get_origin(member), get_args(member)
    if origin is Annotated:
        return " ".join([describe_type(args[0]), *filter(None, map(_describe_bound, args[1:]))])
    if origin in (list, tuple):
        return f"a list, each item {describe_type(args[0])}"
    if origin is dict:
        return f"a mapping, each value {describe_type(args[1])}"
    if dataclasses.is_dataclass(member):
        return "a mapping with the keys " + ", ".join(field.name for field in dataclasses.fields(member))
    return _PLAIN_TYPES.get(member, str(member))


def _describe_bound(bound: Any) -> str:
    match bound:
        case Gt(gt=0):
            return "above 0"
        case Gt(gt=low):
            return f"above {low}"
        case Ge(ge=low):
            return f"of at least {low}"
        case Lt(lt=high):
            return f"below {high}"
        case Le(le=high):
            return f"of at most {high}"
        case MinLen():
            return "that is not empty"
        case Interval():
            return " and ".join(filter(None, map(_describe_bound, bound)))
    return ""
