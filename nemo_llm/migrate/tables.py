"""What keys of NeMo's launcher and arguments of Megatron-LM mean here: nemo.yaml and megatron.yaml beside this file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class Tables:
    """What is known of one project's keys.

    Attributes:
        keys: foreign key -> (our dotted key, codec of `configs.CODECS`).
        defaults: what holds there where a file says nothing: ``always``, and with something that is switched on.
        as_here: keys that have to say what is done here anyway, with the values that do.
        left: keys that need no counterpart, by the reason; ``section.*`` stands for all keys of a section.
        training_only: keys of a model's file that say nothing of what its weights compute.
        required: keys without which the other project does not begin.
    """

    keys: Mapping[str, tuple[str, str]]
    defaults: Mapping[str, Mapping[str, Any]]
    as_here: Mapping[str, str]
    left: Mapping[str, str]
    training_only: str = ""
    required: str = ""


@cache
def tables_of(project: Literal["nemo", "megatron"]) -> Tables:
    """The tables of one project, read once."""
    saved = yaml.safe_load(Path(__file__).with_name(f"{project}.yaml").read_text(encoding="utf-8"))
    return Tables(**{**saved, "keys": {key: tuple(entry) for key, entry in saved["keys"].items()}})
