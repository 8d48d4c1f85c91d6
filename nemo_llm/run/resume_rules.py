"""Whether a run may be resumed with a configuration that differs from the one it was started with.

A key may change when it leaves three things alone: the meaning of the saved state (model, optimizer moments), the order
of the data (a pure function of data, seed and batch sizes), and what is optimised. Everything else may change, and
every change is listed for the user. A key that resume_rules.toml does not name is refused, and a test finds it.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_llm.errors import NO_VALUE, ConfigError, Problem

_RULES: dict[str, list[str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CHANGEABLE_KEYS, FIXED_KEYS = _RULES["changeable"], _RULES["fixed"]
"""Patterns of dotted keys. A test holds every key to one of the lists; a key with a pattern in both may change."""

_NOT_COMPARED = ("run.dir",)


@dataclass(frozen=True, slots=True)
class Change:
    """One key whose value differs from the saved one; `NO_VALUE` stands for a key that is not there."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def compare_configs(
    saved: Mapping[str, Any], new: Mapping[str, Any], also_allowed: Sequence[str] = ()
) -> tuple[list[Change], list[Change]]:
    """Changes from `saved` to `new`, both nested plain mappings: (changed and allowed, changed and forbidden).

    Args:
        saved: configuration that the run was started with, as this version would have saved it.
        new: configuration to go on with.
        also_allowed: patterns of dotted keys that the user allows beside `CHANGEABLE_KEYS`.
    """
    patterns = (*CHANGEABLE_KEYS, *also_allowed)
    fixed = _fixed_by_router(new)
    allowed: list[Change] = []
    forbidden: list[Change] = []
    for change in _differences(saved, new):
        if change.key not in _NOT_COMPARED:
            matches = any(fnmatchcase(change.key, pattern) for pattern in patterns) and change.key not in fixed
            (allowed if matches else forbidden).append(change)
    return allowed, forbidden


def check_agreement(
    saved: Mapping[str, Any], new: Mapping[str, Any], source: Path, also_allowed: Sequence[str] = ()
) -> list[Change]:
    """Allowed changes from `saved`, which was read from `source`, to `new`; list them for the user.

    Raises:
        ConfigError: naming every key that a resume may not change, with both values.
    """
    allowed, forbidden = compare_configs(saved, new, also_allowed)
    if forbidden:
        fixed = _fixed_by_router(new)
        raise ConfigError(
            Problem(
                change.key,
                change.after,
                f"{source} was made with {change.before!r}, and a resume may not change this key"
                + fixed.get(change.key, ""),
                f"set {change.key} back to {change.before!r} to go on, or start anew in another run.dir"
                if change.before is not NO_VALUE
                else "remove the key to go on, or start anew in another run.dir",
            )
            for change in forbidden
        )
    return allowed


def _fixed_by_router(config: Mapping[str, Any]) -> dict[str, str]:
    """Keys that this configuration's router fixes although they are changeable elsewhere, each with the reason."""
    moe = config.get("model", {}).get("moe") or {}
    balance = moe.get("moe_router_load_balancing_type")
    weighed = balance in ("aux_loss", "seq_aux_loss") and moe.get("moe_aux_loss_coeff")
    if not (weighed or balance == "sinkhorn" or moe.get("moe_z_loss_coeff")):
        return {}
    reason = (
        ": the router is balanced over the tokens of a micro-batch, so another size would train something else "
        "(parallelism.recompute_granularity, context and tensor parallelism save memory without that)"
    )
    return {"trainer.micro_batch_size": reason}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """Keys that differ, in order; a list is one value, and so is a section that the other side has as null."""
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, NO_VALUE), after.get(name, NO_VALUE)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif not _same(old, new):
            yield Change(prefix + name, old, new)


def _at_home(value: object) -> object:
    """`value` with the home folder for ``~`` in paths: earlier versions saved them as they were written."""
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, Mapping):
        return {key: _at_home(part) for key, part in value.items()}
    return [_at_home(part) for part in value] if isinstance(value, list) else value


def _same(before: object, after: object) -> bool:
    """Equal; a key absent on one side equals null and an empty mapping, as for keys that a later version added."""
    absent: tuple[object, ...] = (NO_VALUE, None, {})
    return _at_home(before) == _at_home(after) or (before in absent and after in absent)
