"""Configuration of the data tools that are composed from ``conf/`` (``index_dataset.yaml`` and its siblings)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import yaml
from annotated_types import Interval
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from nemo_llm.config.compose.arguments import Texts, key_of, parse
from nemo_llm.config.compose.catalog import annotation_at, conf_dir, known_keys
from nemo_llm.config.compose.messages import problems_of_validation, unknown_key
from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.config.sections.fields import NonEmptyStr, NonNegativeInt, PathStr, PositiveInt, Section
from nemo_llm.errors import NO_VALUE, ConfigError, Problem

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSection(Section):
    """The part of the ``data`` section that a tool needs."""

    tokenizer: TokenizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig(Section):
    """``tools/index_dataset.py``: text in, an indexed dataset out."""

    input: PathStr | list[PathStr]
    """A file, a folder or a glob, or a list of them: JSON lines, Parquet or plain text, also .gz .bz2 .xz .zst."""
    output_prefix: PathStr
    """Path of the result without ``.bin``/``.idx``."""
    workers: NonNegativeInt
    """Processes that tokenise; 0 works in this process."""
    text_key: NonEmptyStr
    """The field (JSON lines) or column (Parquet) that holds the text."""
    plain_text: Literal["file", "line"]
    """Plain text: is a file or a line one document."""
    encoding: NonEmptyStr
    """Encoding of JSON lines and plain text."""
    append_eod: bool
    """Put the end-of-document token after each document."""
    on_bad_record: Literal["skip", "error"]
    """``skip`` counts and reports what cannot be read; ``error`` stops at the first."""
    max_bad_fraction: Annotated[float, Interval(ge=0, le=1)]
    """With ``skip``: nothing is published when a larger share of the records is bad."""
    fast_path: bool
    """Use a faster library where it is proven to give the same ids."""
    overwrite: bool
    """Replace an existing dataset of another making."""
    restart: bool
    """Throw away what an interrupted run with other settings left."""
    cache_dir: PathStr | None
    """Where proofs are kept; null: ``$NEMO_LLM_CACHE``, else ``~/.cache/nemo_llm``."""
    data: TokenizerSection
    """The tokenizer, chosen by ``tokenizer=NAME``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig(Section):
    """``tools/train_tokenizer.py``: a sample of the corpus in, a tokenizer and its report out."""

    input: dict[str, PathStr]
    """Sources by name: a file, a folder, a glob or ``asset:NAME`` each; every source gives as many characters."""
    output: PathStr
    """Folder for the tokenizer; name it in ``data.tokenizer.path``."""
    type: Literal["bpe", "unigram", "byte"]
    """Byte-level BPE, unigram with byte fallback, or plain bytes (nothing to train)."""
    library: Literal["tokenizers", "sentencepiece"]
    """Writes a ``tokenizer.json`` or a SentencePiece ``.model``."""
    vocab_size: PositiveInt
    """Ids, special tokens included."""
    pattern: NonEmptyStr
    """``tokenizers`` BPE only: how text is split: ``r50k_base`` (GPT-2), ``cl100k_base``, ``o200k_base``, or a regular
    expression."""
    eod_token: NonEmptyStr
    """The token that ends a document."""
    special_tokens: tuple[NonEmptyStr, ...]
    """More tokens that text never gives, such as fill-in-the-middle sentinels."""
    sample_characters: PositiveInt
    """Characters taken of each source, from places spread over it."""
    text_key: NonEmptyStr
    """The field (JSON lines) or column (Parquet) that holds the text."""
    plain_text: Literal["file", "line"]
    """Plain text: is a file or a line one document."""
    encoding: NonEmptyStr
    """Encoding of JSON lines and plain text."""


def _split_overrides(name: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides for Hydra, and those it refuses: of keys named as a group (``checkpoint``) and of open mappings.

    A dotted key may set a part of what has no value yet: Hydra wants ``++`` for that.
    """
    root = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {key for key, value in root.items() if isinstance(value, dict) or (conf_dir() / key).is_dir()}
    ours = [text for text in overrides if text.partition("=")[0] in keys - {"hydra"}]
    theirs = [text for text in overrides if text not in ours]
    return [f"++{text.lstrip('+')}" if "." in key_of(text) else text for text in theirs], ours


def _problems_of_arguments(overrides: Sequence[str], texts: Texts, schema: type) -> Iterator[Problem]:
    """Arguments that set nothing that there is, and several values for one key, in our words instead of Hydra's."""
    for argument in overrides:
        key, value = key_of(argument), texts.restore(argument.partition("=")[2])
        override = parse(argument)
        if override is None:
            rule = f"argument {texts.restore(argument)!r} is not of the form key=value"
            yield Problem("", NO_VALUE, rule, "write key=value; --help lists the keys")
        elif annotation_at(key.split("."), schema) is None and not (conf_dir() / key).is_dir() and key != "hydra":
            yield unknown_key(key, value, known_keys(schema))
        elif override.is_sweep_override():
            yield Problem(key, value, "one run takes one value, not several", f"write {key}=<one value>")


def compose_tool(name: str, schema: type[T], overrides: Sequence[str]) -> T:
    """Return the configuration of a tool: ``conf/NAME.yaml`` with overrides, decoded strictly into ``schema``.

    Raises ConfigError with every problem found.
    """
    mapping = compose_mapping(name, schema, overrides)
    try:
        return TypeAdapter(schema).validate_json(json.dumps(mapping), strict=True)
    except ValidationError as error:
        raise ConfigError(problems_of_validation(error.errors(), mapping, schema)) from None


def compose_mapping(name: str, schema: type, overrides: Sequence[str]) -> dict[str, Any]:
    """What ``conf/NAME.yaml`` and overrides make together, not decoded yet (ConfigError)."""
    texts = Texts()
    arguments = [texts.literal(argument, schema) for argument in overrides]
    if problems := list(_problems_of_arguments(arguments, texts, schema)):
        raise ConfigError(problems)
    for_hydra, ours = _split_overrides(name, arguments)
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = compose(config_name=name, overrides=for_hydra)
        for override in OverridesParser.create().parse_overrides(ours):
            OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError([Problem(key, NO_VALUE, "is required", f"add {key}=...") for key in missing])
        mapping: dict[str, Any] = texts.restore(OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        text = texts.restore(" ".join(str(error).split()))
        raise ConfigError([Problem("", NO_VALUE, text, "correct the argument or the file that it names")]) from error
    return mapping
