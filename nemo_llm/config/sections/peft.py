"""The `peft` section: which small parts are trained beside a frozen model."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.fields import DropoutFraction, NonEmptyStr, PathStr, PositiveFloat, PositiveInt, Section

LINEAR_KINDS = ("lora", "dora", "ia3", "adapter")
"""Kinds that change linear layers; the others learn virtual tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig(Section):
    """One method of parameter-efficient fine-tuning. Every kind lists every key; a kind reads those it has use for."""

    kind: Literal["lora", "dora", "ia3", "adapter", "prompt_tuning", "p_tuning"]
    target_modules: tuple[NonEmptyStr, ...]
    """Patterns (``*``, ``?``, ``[]``) of the last part of a module's name, or of the whole name with its dots."""
    rank: PositiveInt
    ranks: dict[str, PositiveInt]
    """Other ranks for the modules that a pattern names; the last pattern that matches wins."""
    alpha: PositiveFloat
    dropout: DropoutFraction
    use_rslora: bool
    """Scale by ``alpha / sqrt(rank)`` (arXiv:2312.03732) rather than by ``alpha / rank``."""
    bottleneck_size: PositiveInt
    num_virtual_tokens: PositiveInt
    encoder_hidden_size: PositiveInt | None
    """Width of p-tuning's MLP; None takes the model's hidden size."""
    init_from: PathStr | None
    """Adapter to start from: a Hugging Face PEFT folder, or a checkpoint of ours."""
    base_weights: Literal["nf4"] | None = None
    """Frozen linear layers in 4 bits an element (QLoRA, arXiv:2305.14314); None: as they are."""

    def __post_init__(self) -> None:
        if self.kind in LINEAR_KINDS and not self.target_modules:
            raise ValueError(f"target_modules is empty, but kind {self.kind} changes linear layers: name some")

    @property
    def virtual_tokens(self) -> int:
        """Positions at the start of every sample that stand for learned vectors."""
        return self.num_virtual_tokens if self.kind in ("prompt_tuning", "p_tuning") else 0
