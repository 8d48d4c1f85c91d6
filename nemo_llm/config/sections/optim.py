"""The `optim` section: the optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from nemo_llm.config.sections.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedConfig(Section):
    """Learning rate by step: linear warm-up, then the named curve down to `min_lr`.

    `decay_steps` counts from step 0 (warm-up included) and never follows `trainer.max_steps`, so that stopping early
    and going on leaves the curve as it was. WSD is warm-up, stable, decay (arXiv:2404.06395).
    """

    name: Literal["cosine", "wsd", "linear", "constant"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt
    min_lr: NonNegativeFloat
    wsd_decay_steps: PositiveInt | None
    wsd_decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig(Section):
    """Muon (Jordan et al., 2024; scaled as in arXiv:2502.16982) for the matrices of the layers."""

    momentum: Annotated[float, Interval(ge=0, lt=1)]
    newton_schulz_steps: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Section):
    """AdamW (arXiv:1711.05101) for all or, with `muon`, for embeddings, output, norms, biases and routers.

    Weight decay leaves norms and biases alone.
    """

    name: Literal["adam", "muon"]
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    adam_beta1: Annotated[float, Interval(ge=0, lt=1)]
    adam_beta2: Annotated[float, Interval(ge=0, lt=1)]
    adam_eps: PositiveFloat
    clip_grad: NonNegativeFloat
    sched: SchedConfig
    muon: MuonConfig | None = None
