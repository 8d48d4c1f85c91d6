"""Reads ``key=value`` and ``group=name`` arguments before Hydra does, to report every mistake in them at once.

Hydra alone stops at the first mistake, and asks for ``+`` or ``++`` according to whether a key already has a value.
Here a plain ``key=value`` always sets the key; whether the key exists is the strict decoder's question.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from nemo_llm.config.compose.arguments import Texts, key_of, parse
from nemo_llm.config.compose.catalog import known_keys, nearest, nearest_key
from nemo_llm.config.migrations import move_key, renamed_keys
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, Problem
from nemo_llm.log import get_logger, is_first_rank

_log = get_logger(__name__)


def normalise(
    overrides: Sequence[str], folder: Path, groups: Mapping[str, Sequence[str]], texts: Texts
) -> tuple[list[str], list[Problem]]:
    """`overrides` in the form in which Hydra takes them, and the problems of those that it cannot take.

    ``+model=`` comes first, so that an experiment is laid over the model wherever it stands on the command line.

    Args:
        folder: the shipped configuration folder, whose ``config.yaml`` says which groups are chosen by default.
        groups: names to choose from in each group, from `catalog.group_choices`.
        texts: takes the texts that are set; marks stand in their place.
    """
    additive = set(groups) - _default_groups(folder)
    problems: list[Problem] = []
    choices: dict[str, str] = {}
    first: list[str] = []
    rest: list[str] = []
    for given in map(_by_new_name, overrides):
        is_key = key_of(given) not in groups and "/" not in key_of(given) and not given.startswith("hydra")
        text = texts.literal(given, RunConfig) if is_key else given
        override = parse(text)
        if override is None:
            problems.append(_unreadable(given))
            continue
        name = override.key_or_group
        if override.is_sweep_override():
            several = given.partition("=")[2]
            problems.append(Problem(name, several, "one run takes one value, not several", f"write {name}=<one value>"))
        elif name.startswith("hydra") or override.is_delete() or override.package is not None:
            rest.append(text)
        elif name in groups:
            if (problem := _choice_problem(override, groups[name], choices)) is not None:
                problems.append(problem)
                continue
            chosen = f"{'+' if name in additive else ''}{name}={override.value()}"
            (first if name == "model" else rest).append(chosen)
        elif "/" in name:
            problems.append(_unknown_group(override, groups))
        else:
            rest.append(f"++{text.lstrip('+')}")
    return first + rest, problems


def rename_keys(mapping: dict[str, Any], arguments: Sequence[str]) -> None:
    """Give keys of a user's files that bear an old name the new one, in place; `arguments` have the last word."""
    given = {key_of(argument) for argument in arguments}
    for old, new in renamed_keys().items():
        if move_key(mapping, old, None if new in given else new):
            _warn_of_old_name(old, new)


def _by_new_name(argument: str) -> str:
    """An argument for a key, or a group, under its old name, as one for the new."""
    key = key_of(argument)
    for old, new in renamed_keys().items():
        if key == old or key.startswith((f"{old}.", f"{old}/")):
            _warn_of_old_name(old, new)
            return argument.replace(old, new, 1)
    return argument


def _warn_of_old_name(old: str, new: str) -> None:
    if is_first_rank():
        _log.warning("%s is called %s now; the old name still works", old, new)


def missing_model(groups: Mapping[str, Sequence[str]]) -> Problem:
    """The problem of a command line that chooses no model."""
    return Problem("model", NO_VALUE, "no model chosen", f"add +model=<{'|'.join(groups['model'])}>")


@cache
def _default_groups(folder: Path) -> frozenset[str]:
    """Groups that ``config.yaml``, or a file that it takes by default, already chooses from."""
    found = set()
    root = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for entry in root["defaults"]:
        if not isinstance(entry, dict):
            continue
        for group, name in entry.items():
            found.add(group)
            content = folder / group / f"{name}.yaml"
            nested = yaml.safe_load(content.read_text(encoding="utf-8")) if content.is_file() else {}
            found |= {
                f"{group}/{part}"
                for item in (nested or {}).get("defaults", ())
                if isinstance(item, dict)
                for part in item
            }
    return frozenset(found)


def _unreadable(text: str) -> Problem:
    if "=" not in text:
        meant = nearest_key(text, known_keys())
        hint = f"write {meant}=<value>" if meant else "write key=value, or group=name"
        return Problem("", NO_VALUE, f"argument {text!r} is not of the form key=value", hint)
    key = text.partition("=")[0]
    return Problem(key, text.partition("=")[2], "Hydra cannot read this value", f"quote it: '{key}=\"...\"'")


def _choice_problem(override: Override, names: Sequence[str], chosen: dict[str, str]) -> Problem | None:
    group, value = override.key_or_group, override.value()
    allowed = f"one of {', '.join(names)}"
    if not isinstance(value, str | int | float):
        fix = f"choose a file with {group}=<name>, and set single keys as {group.replace('/', '.')}.<key>=<value>"
        return Problem(group, value, f"must be {allowed}", fix)
    if str(value) not in names:
        meant = nearest(str(value), names)
        fix = f"did you mean {group}={meant}?" if meant else f"choose {allowed}"
        if group == "cluster":  # a name that is near is another card, with other memory and another peak
            fix = (
                "for a GPU that is not among them set cluster.gpu_name, cluster.gpu_memory_gib and cluster.peak_tflops"
            )
        return Problem(group, value, f"no such choice; it must be {allowed}", fix)
    if group in chosen:
        return Problem(group, value, f"chosen twice, {chosen[group]} before", "keep one of them")
    chosen[group] = str(value)
    return None


def _unknown_group(override: Override, groups: Mapping[str, Sequence[str]]) -> Problem:
    meant = nearest(override.key_or_group, groups)
    fix = f"did you mean {meant}=?" if meant else f"the groups are {', '.join(groups)}"
    return Problem(override.key_or_group, override.value(), "no such group", fix)
