"""What `model.mcore_overrides` may set: every field of Megatron-Core 0.16.1's configuration of a transformer.

*Numbers* change the arithmetic, *speed or memory* leaves it. The rest, in config_fields.toml, is refused: a key of ours
sets it, or nothing here reads it. tests/megatron/test_config_fields.py holds the tables beside Megatron's classes and
tries every field.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_llm.config.sections.fields import Scalar
    from nemo_llm.config.sections.model_setting import ModelSetting


@dataclass(frozen=True, slots=True)
class Override:
    """A field that can be set.

    Attributes:
        allowed: whether Megatron reads this value, and what it reads in words.
        needs: whether the field has an effect in this run, and what it takes in words.
        numbers: whether it changes the arithmetic, and not speed or memory alone.
    """

    allowed: tuple[Callable[[Scalar], bool], str]
    needs: tuple[Callable[[ModelSetting], bool], str]
    numbers: bool = True


def _is_int(value: Scalar) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Scalar) -> bool:
    return isinstance(value, float) or _is_int(value)


def _at_least(least: int) -> tuple[Callable[[Scalar], bool], str]:
    return lambda value: isinstance(value, int) and _is_int(value) and value >= least, f"a whole number from {least}"


def _one_of(*names: str) -> tuple[Callable[[Scalar], bool], str]:
    return lambda value: value in names, " or ".join(names)


_BOOL = (lambda value: isinstance(value, bool), "true or false")
_NUMBER = (_is_number, "a number")
_ABOVE_ZERO = (lambda value: isinstance(value, int | float) and _is_number(value) and value > 0, "a number above 0")


def _given(setting: ModelSetting, name: str) -> bool:
    return name in setting.model.mcore_overrides and bool(setting.model.mcore_overrides[name])


_GATED = (lambda s: s.model.gated_linear_unit, "model.gated_linear_unit=true")
_TOP_K = (
    lambda s: s.model.moe is not None and s.model.moe.moe_router_load_balancing_type != "sinkhorn",
    "a mixture of experts (model.moe) that is not balanced by sinkhorn",
)
_SHARED = (
    lambda s: s.model.moe is not None and s.model.moe.moe_shared_expert_intermediate_size is not None,
    "shared experts (model.moe.moe_shared_expert_intermediate_size)",
)


def _limits_experts(setting: ModelSetting) -> bool:
    moe, factor = setting.model.moe, setting.model.mcore_overrides["moe_expert_capacity_factor"]
    if moe is None or not _TOP_K[0](setting) or not isinstance(factor, int | float):
        return False
    return factor * moe.moe_router_topk <= moe.num_moe_experts


_BELOW_ALL_TOKENS = (
    _limits_experts,
    f"{_TOP_K[1]}, and at most num_moe_experts / moe_router_topk: an expert cannot take more tokens than there are",
)
_CAPACITY = (
    lambda s: _TOP_K[0](s) and _given(s, "moe_expert_capacity_factor"),
    "a mixture of experts and moe_expert_capacity_factor in model.mcore_overrides",
)


def _groups_limit(setting: ModelSetting) -> bool:
    moe, overrides = setting.model.moe, setting.model.mcore_overrides
    groups, chosen = overrides.get("moe_router_num_groups"), overrides.get("moe_router_group_topk")
    if moe is None or not _TOP_K[0](setting) or not isinstance(groups, int) or not isinstance(chosen, int):
        return False
    if not 0 < chosen < groups or moe.num_moe_experts % groups or moe.moe_router_topk % chosen:
        return False
    return moe.moe_router_topk // chosen <= moe.num_moe_experts // groups


_GROUPS = (
    _groups_limit,
    "a mixture of experts, and both moe_router_num_groups (a divisor of num_moe_experts) and moe_router_group_topk (a "
    "smaller number that divides moe_router_topk into at most the experts of a group)",
)
_SIGMOID = (
    lambda s: _TOP_K[0](s) and s.model.moe is not None and s.model.moe.moe_router_score_function == "sigmoid",
    "model.moe.moe_router_score_function=sigmoid",
)
_BIAS = (
    lambda s: _SIGMOID[0](s) and _given(s, "moe_router_enable_expert_bias"),
    "moe_router_enable_expert_bias in model.mcore_overrides, and model.moe.moe_router_score_function=sigmoid",
)
_NARROW = (
    lambda s: s.model.moe is not None and s.precision.params_dtype != "fp32",
    "a mixture of experts and parameters in bf16 or fp16",
)
_ROTARY = (
    lambda s: s.model.position_embedding_type == "rope" and s.model.mla is None,
    "rotary positions (model.position_embedding_type=rope) without latent attention",
)


def _skips_rotary(setting: ModelSetting) -> bool:
    frequency = setting.model.mcore_overrides["no_rope_freq"]
    return _ROTARY[0](setting) and isinstance(frequency, int) and frequency <= setting.model.num_layers


_SKIPS_ROTARY = (_skips_rotary, f"{_ROTARY[1]}, and at most model.num_layers, so that a layer goes without them")
_ONE_EXPERT = (
    lambda s: s.model.moe is not None and s.model.moe.moe_router_topk == 1,
    "a mixture of experts with model.moe.moe_router_topk=1",
)
_OVERLAP = (
    lambda s: _SHARED[0](s) and s.model.moe is not None and s.model.moe.moe_token_dispatcher_type == "alltoall",
    "shared experts and model.moe.moe_token_dispatcher_type=alltoall",
)

FIELDS: dict[str, Override] = {
    "activation_func_clamp_value": Override(_ABOVE_ZERO, _GATED),
    "glu_linear_offset": Override(_NUMBER, _GATED),
    "no_rope_freq": Override(_at_least(1), _SKIPS_ROTARY),
    "moe_apply_probs_on_input": Override(_BOOL, _ONE_EXPERT),
    "moe_expert_capacity_factor": Override(_ABOVE_ZERO, _BELOW_ALL_TOKENS),
    "moe_pad_expert_input_to_capacity": Override(_BOOL, _CAPACITY, numbers=False),
    "moe_router_bias_update_rate": Override(_NUMBER, _BIAS),
    "moe_router_dtype": Override(_one_of("fp32", "fp64"), _NARROW),
    "moe_router_enable_expert_bias": Override(_BOOL, _SIGMOID),
    "moe_router_group_topk": Override(_at_least(1), _GROUPS),
    "moe_router_num_groups": Override(_at_least(1), _GROUPS),
    "moe_router_topk_scaling_factor": Override(_ABOVE_ZERO, _TOP_K),
    "moe_shared_expert_gate": Override(_BOOL, _SHARED),
    "moe_shared_expert_overlap": Override(_BOOL, _OVERLAP, numbers=False),
    "moe_token_drop_policy": Override(_one_of("probs", "position"), _CAPACITY),
}

UNFUSED_ACTIVATION = ("activation_func_clamp_value", "glu_linear_offset")
"""Fields that no fused activation reads."""

_TABLES: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

OWN_KEYS = {name: key.format(name=name) for key, names in _TABLES["own_keys"].items() for name in names.split()}
"""Fields that a key of ours sets, or decides in Megatron's place."""

NOT_BUILT = "is not built here"

UNREAD = {name: why for why, names in _TABLES["unread"].items() for name in names.split()}
"""Fields that have no effect here or cannot work, and why."""
