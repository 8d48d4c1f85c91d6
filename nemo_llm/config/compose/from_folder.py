"""Keys that are read from a folder: ``+model=from_hf``, ``+model=from_checkpoint`` and their tokenizers.

They become overrides that stand before the user's own, so that the command line has the last word.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_llm.config.compose.arguments import Texts, parse
from nemo_llm.config.compose.hf_tokenizer import bos_token, read_json, token_text
from nemo_llm.config.sections.data import NEMO_PATHS
from nemo_llm.errors import NO_VALUE, InputError, Problem
from nemo_llm.families.registry import model_section, read_hf_config

_SOURCES = {"from_hf": "model.hf_path", "from_checkpoint": "model.checkpoint_path"}
_SAVED_TOKENIZER = "nemo_llm_tokenizer.json"


def derived_overrides(arguments: Sequence[str], texts: Texts) -> tuple[list[str], list[Problem]]:
    """`arguments`, as `overrides.normalise` returns them, with what the folders in them say put in.

    Args:
        texts: holds the texts that stand as marks in `arguments`.

    Returns:
        the arguments, and the problems of folders that cannot be read.
    """
    model = _value(arguments, "model", "+")
    tokenizer = _value(arguments, "tokenizer", "") or model
    paths = {key: texts.restore(_value(arguments, key, "++")) for key in _SOURCES.values()}
    problems = [
        Problem(key, paths[key], f"is read by +model={name} alone", f"choose +model={name}")
        for name, key in _SOURCES.items()
        if model not in _SOURCES and tokenizer not in _SOURCES and paths[key] is not None
    ]
    first = [argument for argument in arguments if argument.startswith("+model=")]
    rest = [argument for argument in arguments if not argument.startswith("+model=")]
    found: dict[str, Any] = {}
    for name, readers in _READERS.items():
        wanted = [reader for part, reader in readers.items() if {"model": model, "tokenizer": tokenizer}[part] == name]
        key = _SOURCES[name]
        path = paths[key]
        if wanted and path is None:
            problems.append(Problem(key, NO_VALUE, f"+model={name} needs a folder", f"add {key}=DIR"))
            found.setdefault(key, "?")
        elif wanted:
            try:
                for reader in wanted:
                    found.update(reader(Path(str(path)).expanduser()))
            except InputError as error:
                problems.append(Problem(key, path, str(error), "name another folder"))
    return [*first, *(f"++{key}={texts.hide(value)}" for key, value in found.items()), *rest], problems


def _hf_model(folder: Path) -> dict[str, Any]:
    section = model_section(read_hf_config(folder), str(folder))
    return {"model.name": folder.resolve().name, **{f"model.{key}": value for key, value in section.items()}}


def _hf_tokenizer(folder: Path) -> dict[str, Any]:
    """The token that ends a text, as ``tokenizer_config.json`` names it, and the one that is put before a text."""
    config = read_json(folder / "tokenizer_config.json")
    found = {"data.tokenizer.bos_token": bos_token(folder / "tokenizer.json")}
    if "eos_token" in config:
        found["data.tokenizer.eod_token"] = token_text(config["eos_token"])
    return {key: value for key, value in found.items() if value is not None}


def _checkpoint_model(folder: Path) -> dict[str, Any]:
    path = newest_step(folder) / "config.yaml"
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged; no model section in it ({error})") from None
    left = ("checkpoint_path",)
    return {f"model.{key}": value for key, value in section.items() if key not in left}


def _checkpoint_tokenizer(folder: Path) -> dict[str, Any]:
    saved = newest_step(folder) / "tokenizer"
    path = saved / _SAVED_TOKENIZER
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{saved.parent}: no tokenizer was saved with this checkpoint; choose one with tokenizer=NAME"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged tokenizer description ({error})") from None
    try:
        return {f"data.tokenizer.{key}": value for key, value in with_paths_inside(config, saved).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged tokenizer description ({type(error).__name__}: {error})") from None


def with_paths_inside(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A saved tokenizer's description with its paths made absolute; all of them lie in its own folder.

    Raises:
        InputError: one that does not.
    """

    def inside(value: Any) -> Any:
        if value is None:
            return None
        found = (folder / value).resolve()
        if not found.is_relative_to(folder.resolve()):
            raise InputError(f"{folder / _SAVED_TOKENIZER}: {value} does not lie in the folder of this tokenizer")
        return str(found)

    arguments = {key: inside(value) if key in NEMO_PATHS else value for key, value in dict(config["nemo_args"]).items()}
    return {**config, "path": inside(config["path"]), "nemo_args": arguments}


_READERS = {
    "from_hf": {"model": _hf_model, "tokenizer": _hf_tokenizer},
    "from_checkpoint": {"model": _checkpoint_model, "tokenizer": _checkpoint_tokenizer},
}


def newest_step(folder: Path) -> Path:
    """The newest complete checkpoint at ``folder``: a run folder, its ``checkpoints/`` or one ``step_*``.

    `nemo_llm.checkpoint.folder` decides which of them is whole when it is read; here its small files are wanted.

    Raises:
        InputError: there is none.
    """
    if (folder / "COMPLETE").exists():
        return folder
    within = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    complete = [path.parent for path in within.glob("step_*/COMPLETE")]
    steps = [path for path in complete if path.name.removeprefix("step_").isdecimal()]
    if not steps:
        raise InputError(f"{folder}: no complete checkpoint there (a folder with a file COMPLETE in it)")
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")))


def _value(arguments: Sequence[str], key: str, prefix: str) -> str | None:
    """The value that the last argument for `key` gives; None where there is none."""
    start = f"{prefix}{key}="
    matching = [argument for argument in arguments if argument.startswith(start)]
    if not matching:
        return None
    override = parse(matching[-1])
    value = None if override is None else override.value()
    return None if value is None else str(value)
