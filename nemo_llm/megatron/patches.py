"""Every touch of Megatron-Core's insides, each with the versions that need it and what removes it: `PATCHES`.

They stand in patches.toml, and ``python -m nemo_llm.megatron.patches`` prints them. docs/develop/upgrade-megatron.md
says what 0.19 does in each place; tests/megatron/ holds the text of all that is relied on and shows each fault on
Megatron's own code.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Patch:
    """One thing that is replaced in Megatron-Core, written anew after it, or used though it is private.

    Attributes:
        where: our ``module:name`` that does it.
        versions: minor versions, of those that were read, that need it.
        reason: what Megatron does, or does not offer.
        effect: what is done instead.
        drop: when it can go, and how.
        relies_on: what it replaces, copies or calls: ``module:name`` below ``megatron.core``.
    """

    name: str
    where: str
    versions: list[str]
    reason: str
    effect: str
    drop: str
    relies_on: list[str]


_DECLARED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
READ: list[str] = _DECLARED["read"]
PATCHES = tuple(Patch(name, **fields) for name, fields in _DECLARED["patches"].items())


if __name__ == "__main__":
    for patch in PATCHES:
        print(f"{patch.name} (megatron-core {', '.join(patch.versions)}; {patch.where})")
        print(f"  why: {patch.reason.strip()}\n  effect: {patch.effect.strip()}\n  gone: {patch.drop.strip()}")
