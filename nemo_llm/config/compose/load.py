"""From the command line to a `RunConfig`: Hydra composes ``conf/``, pydantic decodes strictly, all problems at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm.config.compose.arguments import Texts
from nemo_llm.config.compose.catalog import conf_dir, group_choices
from nemo_llm.config.compose.decode import decode, to_dict
from nemo_llm.config.compose.from_folder import derived_overrides
from nemo_llm.config.compose.overrides import missing_model, normalise, rename_keys
from nemo_llm.config.migrations import SAVED_BY, migrate
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, ConfigError, Problem

__all__ = ["decode", "to_dict"]  # beside `compose`, where their users look for them


def compose(
    overrides: Sequence[str], extra_folder: Path | None = None, model: Mapping[str, Any] | None = None
) -> RunConfig:
    """Configuration that ``conf/`` and `overrides` (``key=value``, ``group=name``) make together.

    Args:
        extra_folder: a folder of the user's own groups, searched besides the shipped one.
        model: the model's whole section, where `overrides` choose none.

    Raises:
        ConfigError: with every problem found.
    """
    shipped = conf_dir()
    folders = [shipped] if extra_folder is None else [shipped, extra_folder.resolve()]
    groups = group_choices(folders)
    texts = Texts()
    arguments, problems = normalise(overrides, shipped, groups, texts)
    arguments, unread = derived_overrides(arguments, texts)
    if unread:  # the keys that the folder would have given are missing now: no use in reporting each of them
        raise ConfigError([*problems, *unread])
    if extra_folder is not None:
        arguments.append(f"hydra.searchpath=['file://{extra_folder.resolve()}']")
    try:
        mapping = texts.restore(_compose_mapping(shipped, arguments))
        rename_keys(mapping, arguments)
        if SAVED_BY in mapping:  # a file of the user's is what a run has saved
            mapping = migrate(mapping, "the configuration")
    except (HydraException, OmegaConfBaseException) as error:
        text = texts.restore(" ".join(str(error).split()))
        problem = Problem("", NO_VALUE, text, "correct the argument or the file that it names")
        raise ConfigError([*problems, problem]) from error
    if model is not None:
        mapping |= {"model": dict(model), "run": {**mapping["run"], "name": model["name"]}}
    has_model = "model" in mapping
    if not has_model and all(problem.key != "model" for problem in problems):
        problems.insert(0, missing_model(groups))
    try:
        cfg = decode(mapping)
    except ConfigError as error:
        problems += [problem for problem in error.problems if has_model or problem.key != "model"]
    if problems:
        raise ConfigError(problems)
    return cfg


def _compose_mapping(shipped: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What Hydra composes, as a plain mapping."""
    with initialize_config_dir(config_dir=str(shipped), version_base="1.3"):
        composed = hydra_compose(config_name="config", overrides=list(arguments))
    # Without a model nothing that refers to it can be resolved; the caller reports the model as missing.
    mapping = OmegaConf.to_container(composed, resolve="model" in composed)
    return {str(key): value for key, value in mapping.items()} if isinstance(mapping, dict) else {}
