"""The strict decoder: from nested mappings to a `RunConfig`, every problem at once."""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nemo_llm.config.compose.messages import problems_of_validation
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.config.sections.sources import with_long_forms
from nemo_llm.errors import ConfigError, Problem


@cache
def _decoder() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _validated(mapping: Mapping[str, Any]) -> RunConfig:
    # JSON mode is the strict mode that takes mappings for dataclasses, and whole numbers for floats alone. A date,
    # which YAML knows and JSON does not, is a text.
    return _decoder().validate_json(json.dumps(mapping, default=str), strict=True)


def decode(mapping: Mapping[str, Any]) -> RunConfig:
    """`mapping` as a `RunConfig`; unknown keys, missing keys and wrong types are refused, all at once.

    Raises:
        ConfigError: with every problem found.
    """
    if isinstance(data := mapping.get("data"), Mapping):
        mapping = {**mapping, "data": with_long_forms(data)}
    try:
        return _validated(mapping)
    except ValidationError as error:
        raise ConfigError(problems_of_validation(error.errors(), mapping)) from None


def key_problems(mapping: Mapping[str, Any]) -> list[Problem]:
    """Problems of keys that are missing or unknown, whatever their values are."""
    try:
        _validated(mapping)
    except ValidationError as error:
        errors = [one for one in error.errors() if one["type"] in ("missing", "unexpected_keyword_argument")]
        return problems_of_validation(errors, mapping)
    return []


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """`cfg` as nested plain dictionaries, such that ``decode(to_dict(cfg)) == cfg``."""
    return dataclasses.asdict(cfg)
