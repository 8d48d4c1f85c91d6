"""The `peft` section: which small parts are trained beside a frozen model, each method with its own keys."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nemo_llm.config.sections.fields import (
    DropoutFraction,
    NonEmptyStr,
    PathStr,
    PositiveFloat,
    PositiveInt,
    Section,
    TaggedBy,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig(Section):
    """What every method has; a method adds its own keys."""

    kind: str
    init_from: PathStr | None
    """Adapter to start from: a Hugging Face PEFT folder, or a checkpoint of ours."""
    base_weights: Literal["nf4"] | None = None
    """Frozen linear layers in 4 bits an element (QLoRA, arXiv:2305.14314); None: as they are."""

    @property
    def virtual_tokens(self) -> int:
        """Positions at the start of every sample that stand for learned vectors."""
        return self.num_virtual_tokens if isinstance(self, PromptMethod) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPeftConfig(PeftConfig):
    """A method that changes linear layers."""

    target_modules: tuple[NonEmptyStr, ...]
    """Patterns (``*``, ``?``, ``[]``) of the last part of a module's name, or of the whole name with its dots."""

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError(f"target_modules is empty, but kind {self.kind} changes linear layers: name some")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(LinearPeftConfig):
    """LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

    kind: Literal["lora", "dora"]
    rank: PositiveInt
    ranks: dict[str, PositiveInt]
    """Other ranks for the modules that a pattern names; the last pattern that matches wins."""
    alpha: PositiveFloat
    dropout: DropoutFraction
    use_rslora: bool
    """Scale by ``alpha / sqrt(rank)`` (arXiv:2312.03732) rather than by ``alpha / rank``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ia3Config(LinearPeftConfig):
    """IA3 (arXiv:2205.05638)."""

    kind: Literal["ia3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckConfig(LinearPeftConfig):
    """Houlsby adapters (arXiv:1902.00751)."""

    kind: Literal["adapter"]
    bottleneck_size: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTuningConfig(PeftConfig):
    """Prompt tuning (arXiv:2104.08691)."""

    kind: Literal["prompt_tuning"]
    num_virtual_tokens: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class PTuningConfig(PeftConfig):
    """P-tuning (arXiv:2103.10385)."""

    kind: Literal["p_tuning"]
    num_virtual_tokens: PositiveInt
    encoder_hidden_size: PositiveInt | None
    """Width of the MLP; None takes the model's hidden size."""


LinearMethod = LoraConfig | Ia3Config | BottleneckConfig
PromptMethod = PromptTuningConfig | PTuningConfig
PeftMethod = Annotated[LinearMethod | PromptMethod, TaggedBy("kind")]
