"""The `optim` section: the optimizer and its learning-rate schedule.

The rate is a pure function of the step, so that a resumed run cannot drift from one never stopped. `step` is the number
of the update as `metrics.jsonl` has it: the first update of a run is step 1 and uses ``learning_rate(1)``, so that no
update is spent at a rate of zero (Megatron numbers the first one 0). A step that was skipped for bad gradients counts
like any other.
"""

import math
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


def learning_rate(step: int, peak_lr: float, sched: SchedConfig) -> float:
    """Learning rate of update number `step` (from 1).

    Linear warm-up from 0 reaches `peak_lr` at step ``warmup_steps`` (arXiv:1706.02677). Then, by ``sched.name``:

    - ``cosine``: half a cosine down to ``min_lr`` at step ``decay_steps`` (arXiv:1608.03983);
    - ``linear``: a straight line to the same point (arXiv:2502.15938);
    - ``wsd``: warm-up, stable, decay (arXiv:2404.06395): `peak_lr` until step ``decay_steps - wsd_decay_steps``, then
      ``wsd_decay_style`` down to ``min_lr`` at ``decay_steps``;
    - ``constant``: `peak_lr` for ever; ``decay_steps`` and ``min_lr`` are not read.

    ``decay_steps`` counts from the start of the run, warm-up included; after it the rate stays at ``min_lr``.
    """
    if step < sched.warmup_steps:
        return peak_lr * step / sched.warmup_steps
    if sched.name == "constant":
        return peak_lr
    if step >= sched.decay_steps:
        return sched.min_lr
    # min(): the sum may round to just above the peak, and the curve must not rise after the warm-up.
    return min(peak_lr, sched.min_lr + _share_left(step, sched) * (peak_lr - sched.min_lr))


def _share_left(step: int, sched: SchedConfig) -> float:
    """What is left of ``peak_lr - min_lr`` at a `step` between warm-up and ``decay_steps``: from 1 down to 0."""
    style: str = sched.name
    start = sched.warmup_steps
    if style == "wsd":
        if sched.wsd_decay_steps is None:
            raise ValueError("optim.sched.wsd_decay_steps = None: the wsd schedule needs the length of its decay")
        style, start = sched.wsd_decay_style, sched.decay_steps - sched.wsd_decay_steps
    if step <= start:
        return 1.0
    return _decay(style, (step - start) / (sched.decay_steps - start))


def _decay(style: str, progress: float) -> float:
    """Value of a decay curve at `progress` in 0..1; every curve falls from 1 to 0."""
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if style == "linear":
        return 1.0 - progress
    if style == "minus_sqrt":  # arXiv:2405.18392, section 3
        return 1.0 - math.sqrt(progress)
    if style == "exponential":  # as Megatron has it: the half-life curve of arXiv:2404.06395, shifted to end at 0
        return 2.0 * math.pow(0.5, progress) - 1.0
    raise ValueError(f"unknown decay style {style!r}: use cosine, linear, minus_sqrt or exponential")
