"""Keys that are read from a folder: ``+model=from_hf``, ``+model=from_checkpoint`` and their tokenizers.

They become overrides that stand before the user's own, so that the command line has the last word.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_llm.checkpoint.saved_run import SavedRun, read_tokenizer
from nemo_llm.config.compose.arguments import Texts, parse
from nemo_llm.config.compose.hf_tokenizer import bos_token, read_json, token_text
from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.config.shipped import read_shipped
from nemo_llm.errors import NO_VALUE, InputError, Problem
from nemo_llm.families.registry import model_section, read_hf_config

_SOURCES = {"from_hf": "model.hf_path", "from_checkpoint": "model.checkpoint_path"}


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


def hf_tokenizer(folder: Path) -> TokenizerConfig:
    """The tokenizer section of a Hugging Face folder, as ``tokenizer=from_hf`` has it.

    Raises:
        InputError: files that cannot be read.
    """
    found = {key.rpartition(".")[2]: value for key, value in _hf_tokenizer(folder).items()}
    return TokenizerConfig(**{**read_shipped("tokenizer/from_hf"), "path": str(folder.resolve()), **found})


def _checkpoint_model(folder: Path) -> dict[str, Any]:
    section = SavedRun.open(folder).mapping["model"]
    return {f"model.{key}": value for key, value in section.items() if key != "checkpoint_path"}


def _checkpoint_tokenizer(folder: Path) -> dict[str, Any]:
    section = asdict(read_tokenizer(SavedRun.open(folder).tokenizer))
    return {f"data.tokenizer.{key}": value for key, value in section.items()}


_READERS = {
    "from_hf": {"model": _hf_model, "tokenizer": _hf_tokenizer},
    "from_checkpoint": {"model": _checkpoint_model, "tokenizer": _checkpoint_tokenizer},
}


def _value(arguments: Sequence[str], key: str, prefix: str) -> str | None:
    """The value that the last argument for `key` gives; None where there is none."""
    start = f"{prefix}{key}="
    matching = [argument for argument in arguments if argument.startswith(start)]
    if not matching:
        return None
    override = parse(matching[-1])
    value = None if override is None else override.value()
    return None if value is None else str(value)
