"""What was saved of a run: the one reader of run folders, of checkpoints and of what conversion makes. No torch.

Whatever version saved it, its configuration is what today's would have saved (`nemo_llm.config.migrations`).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml

from nemo_llm import __version__
from nemo_llm.checkpoint.folder import (
    ADAPTER_FILE_NAME,
    CONFIG_FILE_NAME,
    TOKENIZER_FOLDER_NAME,
    read_config,
    resolve_checkpoint,
    step_of,
)
from nemo_llm.config.compose.decode import decode, key_problems
from nemo_llm.config.migrations import SAVED_BY, migrate, saved_by
from nemo_llm.config.sections.data import NEMO_PATHS, TokenizerConfig
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, ConfigError, InputError, Problem

TEMPLATE_FILE_NAME = "chat_template.jinja"
TOKENIZER_FILE_NAME = "nemo_llm_tokenizer.json"


@dataclass(frozen=True)
class SavedRun:
    """One folder that holds a configuration.

    Attributes:
        folder: the checkpoint, or the run folder where `at` was given one.
        mapping: the configuration as nested mappings; every key of `RunConfig` is there, and no other.
    """

    folder: Path
    mapping: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """The newest complete checkpoint at ``path``: a run folder, its ``checkpoints/`` or one ``step_*``.

        Raises:
            CheckpointNotFoundError: there is none.
            InputError, ConfigError: as `at`.
        """
        return cls.at(resolve_checkpoint(path))

    @classmethod
    def at(cls, folder: Path) -> Self:
        """What stands in ``folder`` itself, whether or not it is complete.

        Raises:
            InputError: it holds no configuration, a damaged one, or one of a newer version.
            ConfigError: a key of it is unknown to this version, or missing and given by no migration; all are named.
        """
        path, saved = folder / CONFIG_FILE_NAME, read_config(folder)
        mapping = migrate(saved, path)
        if problems := key_problems(mapping):
            version = saved.get(SAVED_BY, {}).get("version")
            raise ConfigError(_of_file(problem, path, version) for problem in problems)
        return cls(folder, mapping)

    @property
    def step(self) -> int | None:
        """The step that the folder's name says; None for one that conversion made, or a run folder."""
        return step_of(self.folder)

    @cached_property
    def sections(self) -> RunConfig:
        """The configuration, decoded.

        Raises:
            ConfigError: a value that this version does not take.
        """
        return decode(self.mapping)

    @property
    def tokenizer(self) -> Path:
        """The folder of the saved tokenizer.

        Raises:
            InputError: there is none.
        """
        folder = self.folder / TOKENIZER_FOLDER_NAME
        if not folder.is_dir():
            raise InputError(
                f"{self.folder}: holds no {TOKENIZER_FOLDER_NAME}/ folder, so that text cannot be encoded.\n      fix: "
                f"copy {TOKENIZER_FOLDER_NAME}/ from a checkpoint of the same run, convert the model again with its "
                "tokenizer, or choose one with tokenizer=NAME"
            )
        return folder

    @property
    def chat_template(self) -> Path | None:
        """The chat template that stands beside the tokenizer."""
        path = self.folder / TOKENIZER_FOLDER_NAME / TEMPLATE_FILE_NAME
        return path if path.is_file() else None

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter alone, and not the weights that it stands beside."""
        return (self.folder / ADAPTER_FILE_NAME).is_file()


def config_text(sections: Mapping[str, Any]) -> str:
    """What ``config.yaml`` says: these sections, and by which version they are saved."""
    stamped = {**sections, SAVED_BY: saved_by()}
    return yaml.safe_dump(stamped, sort_keys=False, allow_unicode=True, width=120)


def write_config(folder: Path, sections: Mapping[str, Any]) -> None:
    """Write the configuration of a checkpoint that no run saves."""
    (folder / CONFIG_FILE_NAME).write_text(config_text(sections), encoding="utf-8")


def _of_file(problem: Problem, path: Path, version: object) -> Problem:
    """The problem of a key that stands, or is missing, in a saved configuration."""
    if problem.value is NO_VALUE:
        rule, fix = (
            f"missing in {path}, and no migration gives it",
            "use the version that saved it, or a file that is whole",
        )
    else:
        rule = f"{path} holds it, and nemo_llm {__version__} has no such key"
        fix = f"use the version that saved it ({version or 'its first lines name it'})"
    return dataclasses.replace(problem, rule=rule, fix=fix)


def read_tokenizer(folder: Path) -> TokenizerConfig:
    """The configuration of a saved tokenizer; its paths are absolute, and lie in its folder.

    Raises:
        InputError: no tokenizer, a damaged description, or a path out of the folder.
    """
    path = folder / TOKENIZER_FILE_NAME
    try:
        saved = {"data": {"tokenizer": json.loads(path.read_text(encoding="utf-8"))}}
        return TokenizerConfig(**_with_paths_inside(migrate(saved, path)["data"]["tokenizer"], folder))
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no tokenizer ({TOKENIZER_FILE_NAME} is missing)") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged tokenizer description ({error})") from None


def _with_paths_inside(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A saved tokenizer's description with its paths made absolute; all of them lie in its own folder.

    Raises:
        InputError: one that does not.
    """

    def inside(value: Any) -> Any:
        if value is None:
            return None
        found = (folder / value).resolve()
        if not found.is_relative_to(folder.resolve()):
            raise InputError(f"{folder / TOKENIZER_FILE_NAME}: {value} does not lie in the folder of this tokenizer")
        return str(found)

    arguments = {key: inside(value) if key in NEMO_PATHS else value for key, value in dict(config["nemo_args"]).items()}
    return {**config, "path": inside(config["path"]), "nemo_args": arguments}
