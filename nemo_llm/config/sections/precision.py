"""The `precision` section: number formats of parameters, gradients and matrix products."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.fields import NonEmptyStr, PositiveFloat, PositiveInt, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Config(Section):
    """FP8 matrix products through Transformer Engine (arXiv:2209.05433)."""

    fp8: Literal["hybrid", "e4m3"]
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    fp8_amax_history_len: PositiveInt
    fp8_amax_compute_algo: Literal["max", "most_recent"]
    fp8_param: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig(Section):
    """Number formats; the loss-scale fields are read with fp16 alone."""

    name: NonEmptyStr
    params_dtype: Literal["bf16", "fp16", "fp32"]
    grad_reduce_in_fp32: bool
    initial_loss_scale: PositiveFloat
    min_loss_scale: PositiveFloat
    loss_scale_window: PositiveInt
    hysteresis: PositiveInt
    fp8: Fp8Config | None
