"""Configuration of the entry points that use a trained model: generate, chat and evaluate."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from nemo_llm.config.sections.fields import (
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PathStr,
    PositiveFloat,
    PositiveInt,
    Section,
)
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.errors import ConfigError, Problem

Share = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig(Section):
    """How the next token is chosen and when a text ends."""

    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt | None
    top_p: Share | None
    min_p: Share | None
    repetition_penalty: PositiveFloat
    stop: tuple[NonEmptyStr, ...]
    stop_tokens: tuple[NonEmptyStr, ...] | None
    ignore_eod: bool
    seed: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlace(Section):
    """Where and how trained models run."""

    parallelism: ParallelismConfig
    dtype: Literal["fp32", "bf16", "fp16"] | None
    accelerator: Literal["auto", "cpu", "cuda"]
    verify: Literal["full", "sampled", "sizes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(ModelPlace):
    """``python -m nemo_llm.generate``."""

    checkpoint: PathStr
    text: str | list[str] | None
    text_file: PathStr | None
    output: PathStr | None
    chat: bool
    chat_template: PathStr | None
    stream: bool
    batch_size: PositiveInt
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        if (self.text is None) == (self.text_file is None):
            received = "neither" if self.text is None else "both"
            raise ConfigError(
                [Problem("text", self.text, f"give either text or text_file, received {received}", 'add text="..."')]
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatToolConfig(ModelPlace):
    """``python -m nemo_llm.chat``."""

    checkpoint: PathStr
    system: str | None
    chat_template: PathStr | None
    sampling: SamplingConfig
