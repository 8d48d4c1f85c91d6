"""Turns what pydantic and Hydra say into problems in the project's own words: key, value, what is allowed, the fix."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_llm.config.compose.catalog import (
    KeyInfo,
    annotation_at,
    choices_of,
    conf_dir,
    describe_type,
    known_keys,
    nearest,
    nearest_key,
    tag_of,
    union_members,
)
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, ConfigError, Problem

_MISSING = "missing"
_TO_BE_GIVEN = "???"  # OmegaConf's mark of a value that the user must give
_UNEXPECTED = "unexpected_keyword_argument"
_WITHOUT_MEMBER = ("union_tag_invalid", "union_tag_not_found")
_SAME_CHOICE = {"gpu": "cuda"}  # by letters it is nearer to cpu


Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Located:
    """One of pydantic's errors: its path in the mapping; within a union also the union's path and the member's name."""

    path: Path
    union_at: Path | None
    member: str
    error: Mapping[str, Any]


def problems_of_validation(
    errors: Sequence[Mapping[str, Any]], mapping: Mapping[str, Any], section: type = RunConfig
) -> list[Problem]:
    """One problem for each key that pydantic's `errors` name.

    Args:
        errors: ``ValidationError.errors()``.
        mapping: what was decoded, to show the values received.
        section: the class that it was decoded into.
    """
    located = [_locate(error, mapping) for error in errors]
    problems: dict[Path, list[Problem]] = {}
    for item in located:
        if item.union_at is not None and not _speaks_for_union(item, located):
            continue
        own = _problems_of_section(item)
        if item.error["type"] in _WITHOUT_MEMBER and isinstance(_value_at(mapping, item.path), Mapping):
            own = _problems_of_tag(item.path, mapping, section)
        problems.setdefault(item.path, own or [_problem(item.path, item.error, mapping, section)])
    return [problem for found in problems.values() for problem in found]


def _problems_of_section(item: _Located) -> list[Problem]:
    """Problems that a section's ``__post_init__`` raised by itself, already in our words."""
    if item.error["type"] != "value_error":
        return []
    raised = item.error["ctx"]["error"]
    if isinstance(raised, ConfigError):
        return list(raised.problems)
    return [Problem(_dotted(item.path), NO_VALUE, str(raised), "")]


def _problem(path: Path, error: Mapping[str, Any], mapping: Mapping[str, Any], section: type) -> Problem:
    key, value, annotation = _dotted(path), _value_at(mapping, path), annotation_at(path, section)
    if error["type"] == _UNEXPECTED:
        return _of_other_member(path, mapping, section) or unknown_key(key, value, known_keys(section))
    allowed = error["msg"] if annotation is None else describe_type(annotation)
    if error["type"] == _MISSING and value is NO_VALUE:
        return Problem(key, NO_VALUE, f"missing; it takes {allowed}", f"add {key}=<value>")
    if value == _TO_BE_GIVEN:
        return Problem(key, NO_VALUE, f"has no value yet; it takes {allowed}", f"add {key}=<value>")
    if isinstance(value, float) and not math.isfinite(value):
        return Problem(key, value, "must be a finite number", f"write {key}=<{allowed}>")
    return Problem(key, value, f"must be {allowed}", _fix_for_value(key, value, annotation))


def _problems_of_tag(path: Path, mapping: Mapping[str, Any], section: type) -> list[Problem]:
    """Of a section that does not say, or not rightly, which member of a union it is; unknown keys speak first."""
    annotation, key = annotation_at(path, section), _dotted(path)
    tag, value = tag_of(annotation), _value_at(mapping, path)
    assert tag is not None
    assert isinstance(value, Mapping)
    members = _members(annotation)
    tags = [name for member in members for name in tag.tags(member)]
    known = {field.name: KeyInfo(None, False) for member in members for field in dataclasses.fields(member)}
    if tag.key not in value:
        known |= dict.fromkeys(tag.short_forms, KeyInfo(None, False))
        in_section = {f"{key.partition('[')[0]}.{name}": info for name, info in known.items()}
        unknown = [unknown_key(f"{key}.{name}", value[name], in_section) for name in value if name not in known]
        rule = f"missing; it takes one of {', '.join(tags)}"
        short = f"add one of {', '.join((tag.key, *tag.short_forms))}"
        fix = short if tag.short_forms else f"choose {key}=<{'|'.join(tags)}>"
        return unknown or [Problem(f"{key}.{tag.key}", NO_VALUE, rule, fix)]
    given = value[tag.key]
    meant = nearest(given, tags) if isinstance(given, str) else None
    fix = f"did you mean {meant}?" if meant else "choose one of them"
    return [Problem(f"{key}.{tag.key}", given, f"must be one of {', '.join(tags)}", fix)]


def _of_other_member(path: Path, mapping: Mapping[str, Any], section: type) -> Problem | None:
    """The problem of a key that the chosen member of a union lacks; None where there is no such union."""
    owner = annotation_at(path[:-1], section)
    tag, value = tag_of(owner), _value_at(mapping, path[:-1])
    if tag is None or not isinstance(value, Mapping):
        return None
    chosen = value[tag.key]
    member = next(member for member in _members(owner) if chosen in tag.tags(member))
    names = [field.name for field in dataclasses.fields(member)]
    meant = nearest(str(path[-1]), names)
    group = _dotted(path[:-1])
    by_file = f", which {group}={chosen} chooses," if _is_file_of(group, chosen) else ""
    listed = f"remove it; the keys of {tag.key} {chosen}{by_file} are {', '.join(names)}"
    rule = f"{tag.key} {chosen} has no such key"
    fix = f"did you mean {_dotted((*path[:-1], meant))}?" if meant else listed
    return Problem(_dotted(path), value[path[-1]], rule, fix)


def _members(annotation: Any) -> list[type]:
    return [one for one in union_members(annotation) if isinstance(one, type) and dataclasses.is_dataclass(one)]


def unknown_key(key: str, value: object, keys: Mapping[str, KeyInfo]) -> Problem:
    """The problem of a key that is none of `keys`, with the one that was probably meant."""
    section = key.rpartition(".")[0]
    plain = section.partition("[")[0]
    siblings = [name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == plain]
    meant = nearest_key(key, keys) if plain == section else nearest(key.rpartition(".")[2], siblings)
    if meant is not None:
        return Problem(key, value, "no such key", f"did you mean {meant}?")
    where = f"keys of {section}" if section else "sections"
    return Problem(key, value, "no such key", f"remove it; the {where} are {', '.join(siblings)}")


def _fix_for_value(key: str, value: object, annotation: Any) -> str:
    if annotation is None:
        return f"correct {key}"
    allowed, choices = describe_type(annotation), choices_of(annotation)
    if isinstance(value, str) and dataclasses.is_dataclass(annotation):
        groups = [group for group in (key.replace(".", "/"), key.rpartition(".")[2]) if _is_file_of(group, value)]
        if groups:
            return f"a file of conf/ is chosen by its group: {groups[0]}={value}"
    if choices and isinstance(value, str):
        meant = _SAME_CHOICE.get(value) or nearest(value, choices)
        return f"did you mean {key}={meant}?" if meant in choices else f"write {key}={choices[0]}"
    if "number" in allowed and isinstance(value, str) and (number := _as_number(value)) is not None:
        return f"write it without quotes: {key}={number}"
    if "whole number" in allowed and isinstance(value, float) and value.is_integer() and value > 0:
        return f"write it without a fraction: {key}={int(value)}"
    if "text" in allowed and isinstance(value, int | float):
        return f"write it in quotes: {key}='\"{value}\"'"
    return f"write {key}=<{allowed}>"


def _is_file_of(group: str, name: str) -> bool:
    return (conf_dir() / group / f"{name}.yaml").is_file()


def _as_number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _locate(error: Mapping[str, Any], mapping: Mapping[str, Any]) -> _Located:
    """Tell the parts of pydantic's location that lead into `mapping` from those that name a member of a union."""
    path: list[str | int] = []
    union_at, member = None, ""
    value: Any = mapping
    location = error["loc"]
    for place, part in enumerate(location):
        inside = (isinstance(value, Mapping) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
            path.append(part)
        elif error["type"] == _MISSING and place == len(location) - 1:
            path.append(part)
        elif union_at is None:
            union_at, member = tuple(path), str(part)
    return _Located(tuple(path), union_at, member, error)


def _speaks_for_union(item: _Located, located: Sequence[_Located]) -> bool:
    """True for errors of the union member that fits best: the one that fails deepest inside, or else the first."""
    depths: dict[str, int] = {}
    for other in located:
        if other.union_at == item.union_at:
            depths[other.member] = min(len(other.path), depths.setdefault(other.member, len(other.path)))
    return item.member == max(depths, key=lambda member: depths[member])


def _dotted(path: Path) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


def _value_at(mapping: Mapping[str, Any], path: Path) -> object:
    value: Any = mapping
    for part in path:
        if isinstance(value, Mapping) and part not in value:
            return NO_VALUE
        value = value[part]
    return value
