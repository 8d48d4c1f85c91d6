"""Changes of the configuration since the first runs (2026-11-23), one module a change.

A branch that adds, renames, drops or reshapes a key adds a module ``mYYYY_MM_DD_slug.py``, with any of:

``ADDED``
    dotted keys and, for each, the value that leaves an earlier run as it was, whatever ``conf/`` ships. A key of a
    section that is null, or that a part of a configuration lacks, is left out.
``RENAMED``
    old dotted keys and their new ones. The command line takes the old ones too, with a warning.
``DROPPED``
    patterns of dotted keys that are gone and never had an effect.
``def change(saved)``
    what the three cannot say: returns the mapping as it would be saved after the change. It may alter its argument,
    which is a copy, and must take one that lacks whole sections.

They are applied in the order of names, within a module in this order. A run is saved with the names of those that were
known then (`saved_by`), and gets the others when it is read. Runs saved before 2026-11-30 hold no such list and get all
of them: up to that day a migration must leave alone what is in the new form already.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from nemo_llm import __version__
from nemo_llm.errors import InputError
from nemo_llm.log import get_logger

_log = get_logger(__name__)

SAVED_BY = "saved_by"
"""Section of a saved configuration that is no section of `RunConfig`: ``version`` and ``migrations``."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One change; a pure function from a configuration saved before it to the same one saved after it."""

    name: str
    added: Mapping[str, Any]
    renamed: Mapping[str, str]
    dropped: Sequence[str]
    change: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = copy.deepcopy(dict(saved))
        for old, new in self.renamed.items():
            move_key(result, old, new)
        for key, value in self.added.items():
            parent, _, name = key.rpartition(".")
            for section in _sections(result, parent):
                section.setdefault(name, copy.deepcopy(value))
        result = self.change(result)
        for pattern in self.dropped:
            move_key(result, pattern, None)
        return result


@cache
def migrations() -> tuple[Migration, ...]:
    """All of them, in the order in which they are applied."""
    found = []
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = vars(importlib.import_module(f"{__name__}.{name}"))
        values = (module.get("ADDED", {}), module.get("RENAMED", {}), module.get("DROPPED", ()))
        found.append(Migration(name.removeprefix("m"), *values, module.get("change", lambda saved: saved)))
    return tuple(found)


def migrate(saved: Mapping[str, Any], source: object, known: Sequence[Migration] | None = None) -> dict[str, Any]:
    """A configuration, or some sections of one, as this version would have saved it.

    Args:
        source: the file that it was read from, for messages.
        known: the migrations that there are; None: `migrations`.

    Raises:
        InputError: a newer version saved it.
    """
    known = migrations() if known is None else known
    result = {name: section for name, section in saved.items() if name != SAVED_BY}
    stamp = saved.get(SAVED_BY, {})
    if not isinstance(stamp, Mapping) or not isinstance(stamp.get("migrations", []), list):
        raise InputError(f"{source}: damaged; {SAVED_BY} does not hold a version and a list of migrations")
    applied = [str(name) for name in stamp.get("migrations", [])]
    if newer := [name for name in applied if name not in {one.name for one in known}]:
        raise InputError(
            f"{source}: saved by nemo_llm {stamp.get('version')}, which is newer than this one ({__version__}): it has "
            f"changed the configuration in ways that this version does not know ({', '.join(newer)}).\n"
            f"      fix: use nemo_llm {stamp.get('version')} or a later one"
        )
    for migration in known:
        if migration.name in applied:
            continue
        for pattern in migration.dropped:
            for _, name in _matches(result, pattern):
                _log.info("%s: %s is left out: it never had an effect", source, pattern.rpartition(".")[0] + "." + name)
        result = migration(result)
    return result


def saved_by() -> dict[str, Any]:
    """The section `SAVED_BY` of what this version saves."""
    return {"version": __version__, "migrations": [migration.name for migration in migrations()]}


def renamed_keys() -> dict[str, str]:
    """Old dotted keys and what they are called today."""
    found: dict[str, str] = {}
    for migration in migrations():
        found = {old: migration.renamed.get(new, new) for old, new in found.items()} | dict(migration.renamed)
    return found


def move_key(mapping: dict[str, Any], old: str, new: str | None) -> bool:
    """Take the value at ``old`` to ``new`` (None: away), in place; returns whether there was one."""
    found = list(_matches(mapping, old))
    for section, name in found:
        value = section.pop(name)
        if new is not None:
            *parents, last = new.split(".")
            for parent in parents:
                mapping = mapping.setdefault(parent, {})
            mapping[last] = value
    return bool(found)


def _sections(mapping: Any, path: str) -> Iterator[dict[str, Any]]:
    """The section at ``path``, if it is one; "" is the whole."""
    for name in path.split(".") if path else ():
        mapping = mapping.get(name) if isinstance(mapping, dict) else None
    if isinstance(mapping, dict):
        yield mapping


def _matches(mapping: dict[str, Any], pattern: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(section, name) of the keys whose last name matches that of ``pattern``."""
    parent, _, last = pattern.rpartition(".")
    for section in _sections(mapping, parent):
        yield from ((section, name) for name in list(section) if fnmatchcase(name, last))
