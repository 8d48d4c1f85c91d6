"""From the command line to a `RunConfig`: Hydra composes ``conf/``, pydantic decodes strictly, all problems at once."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from nemo_llm.config.run import RunConfig
from nemo_llm.errors import ConfigError, Problem


def conf_dir() -> Path:
    """Folder of the shipped YAML: inside the package when installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} nor beside it: the installation is incomplete")


def compose_mapping(overrides: Sequence[str]) -> dict[str, Any]:
    """Plain mapping that ``conf/config.yaml`` and Hydra `overrides` (``key=value``, ``group=name``) make together."""
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        composed = hydra_compose(config_name="config", overrides=list(overrides))
    return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)


def compose(overrides: Sequence[str]) -> RunConfig:
    """Configuration that ``conf/`` and `overrides` make together.

    Raises:
        ConfigError: with every problem found.
    """
    return decode(compose_mapping(overrides))


def decode(mapping: Mapping[str, Any]) -> RunConfig:
    """`mapping` as a `RunConfig`; unknown keys, missing keys and wrong types are refused, all at once.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        return TypeAdapter(RunConfig).validate_json(json.dumps(mapping), strict=True)
    except ValidationError as error:
        raise ConfigError(
            Problem(".".join(map(str, item["loc"])), item["input"], item["msg"], "correct the value")
            for item in error.errors()
        ) from None


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """`cfg` as nested plain dictionaries, such that ``decode(to_dict(cfg)) == cfg``."""
    return dataclasses.asdict(cfg)
