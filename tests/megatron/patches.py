"""The declarations of nemo_llm/megatron/patches.toml as values."""

import tomllib
from dataclasses import dataclass

from tests.test_architecture import PACKAGE


@dataclass(frozen=True, slots=True)
class Patch:
    """One thing that is replaced in Megatron-Core, written anew after it, or used though it is private."""

    name: str
    where: str
    versions: list[str]
    reason: str
    effect: str
    drop: str
    relies_on: list[str]


_DECLARED = tomllib.loads((PACKAGE / "megatron/patches.toml").read_text(encoding="utf-8"))
READ: list[str] = _DECLARED["read"]
PATCHES = tuple(Patch(name, **fields) for name, fields in _DECLARED["patches"].items())
