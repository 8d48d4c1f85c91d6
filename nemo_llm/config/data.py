"""The `data` section: what is trained on."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.section import NonEmptyStr, PositiveFloat, PositiveInt, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendSource(Section):
    """One source: an indexed ``<prefix>.bin/.idx`` pair, or a text file that is tokenised and indexed first."""

    name: NonEmptyStr
    prefix: str | None = None
    weight: PositiveFloat
    text: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig(Section):
    """Which tokenizer turns text into token ids."""

    name: NonEmptyStr
    type: Literal["bpe", "huggingface", "sentencepiece", "null"]
    path: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """Training and validation blends. A blend is a list of sources, or Megatron's flat list of weight, path pairs."""

    name: NonEmptyStr
    blend: list[BlendSource] | list[float | str]
    validation: dict[str, list[BlendSource] | list[float | str]]
    split: str | None
    seq_length: PositiveInt
    tokenizer: TokenizerConfig
