"""From the command line to a `RunConfig`: Hydra composes ``conf/``, pydantic decodes strictly, all problems at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
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
from nemo_llm.config.migrations import m2026_11_29_methods_of_peft, m2026_11_29_sources_by_kind
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, ConfigError, Problem

__all__ = ["decode", "to_dict"]  # beside `compose`, where their users look for them


def compose(overrides: Sequence[str], extra_folder: Path | None = None) -> RunConfig:
    """Configuration that ``conf/`` and `overrides` (``key=value``, ``group=name``) make together.

    Args:
        extra_folder: a folder of the user's own groups, searched besides the shipped one.

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
    except (HydraException, OmegaConfBaseException) as error:
        text = texts.restore(" ".join(str(error).split()))
        problem = Problem("", NO_VALUE, text, "correct the argument or the file that it names")
        raise ConfigError([*problems, problem]) from error
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


def decode_saved(saved: Mapping[str, Any]) -> RunConfig:
    """A saved configuration as a `RunConfig`, see `with_younger_keys`.

    Raises:
        ConfigError: with every problem found.
    """
    return decode(with_younger_keys(saved))


def with_younger_keys(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that an earlier version saved, and the keys that have been added since.

    A key that is missing has the value of the shipped file that its section was made from, or else of the section's
    default file. A section that was saved as null stays null. Keys that every model file has to give (sizes) have no
    such value and stay missing.
    """
    saved = m2026_11_29_methods_of_peft.change(m2026_11_29_sources_by_kind.change(dict(saved)))
    shipped = conf_dir()
    known = group_choices([shipped])
    choices = {
        group: _at(saved, path)
        for group, path in _NAMED.items()
        if isinstance(_at(saved, path), str) and _at(saved, path) in known[group]
    }
    defaults = _compose_mapping(shipped, [f"{group}={choice}" for group, choice in choices.items()])
    defaults["model"] = _read_family(shipped, "llama")
    if isinstance(_at(saved, "model.moe"), Mapping):
        defaults["model"]["moe"] = _read_family(shipped, "moe")
    return _filled(saved, defaults)


# Where a saved configuration says which file of a group it was made from.
_NAMED = {
    "precision": "precision.name",
    "optim": "optim.name",
    "optim/sched": "optim.sched.name",
    "data": "data.name",
    "tokenizer": "data.tokenizer.name",
    "task": "task.name",
    "cluster": "cluster.name",
    "peft": "peft.kind",
}


def _at(mapping: Any, path: str) -> Any:
    for part in path.split("."):
        mapping = mapping.get(part) if isinstance(mapping, Mapping) else None
    return mapping


def _read_family(shipped: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((shipped / "model" / "family" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(saved)
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled.get(key, {}), Mapping):
            filled[key] = _filled(filled.get(key, {}), default)
        elif key not in filled and not (isinstance(default, str) and (default == "???" or "${" in default)):
            filled[key] = default
    return filled


def _compose_mapping(shipped: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """What Hydra composes, as a plain mapping."""
    with initialize_config_dir(config_dir=str(shipped), version_base="1.3"):
        composed = hydra_compose(config_name="config", overrides=list(arguments))
    # Without a model nothing that refers to it can be resolved; the caller reports the model as missing.
    mapping = OmegaConf.to_container(composed, resolve="model" in composed)
    return {str(key): value for key, value in mapping.items()} if isinstance(mapping, dict) else {}
