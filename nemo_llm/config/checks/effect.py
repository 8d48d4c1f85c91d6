"""No key without an effect: overrides of Megatron's fields, and keys of ours that this model does not read."""

from collections.abc import Iterator

from nemo_llm.config.compose.catalog import nearest
from nemo_llm.config.sections.fields import Scalar
from nemo_llm.config.sections.model import SCALING_FIELDS, ModelConfig, MoeConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.errors import Problem
from nemo_llm.megatron.config_fields import FIELDS, NOT_BUILT, OWN_KEYS, UNREAD

_OVERRIDES = "model.mcore_overrides"
DEFAULTS: dict[str, Scalar] = {"rotary_base": 10000.0, "rotary_percent": 1.0, "moe_aux_loss_coeff": 0.01}
"""Values that stand in conf/ and say nothing by themselves; any other was given on purpose."""


def check_overrides(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Fields of Megatron that have no key of ours, and an effect in this run."""
    for name, value in setting.model.mcore_overrides.items():
        key = f"{_OVERRIDES}.{name}"
        if name in OWN_KEYS:
            yield Problem(key, value, f"is set by {OWN_KEYS[name]}", f"remove it, and set {OWN_KEYS[name]}")
        elif name in UNREAD:
            # A layer of the user's own may be what reads the field.
            if UNREAD[name] != NOT_BUILT or setting.model.layer_spec is None:
                yield Problem(key, value, f"would have no effect: it {UNREAD[name]}", f"remove it, or {_choices()}")
        elif name not in FIELDS:
            meant = nearest(name, [*FIELDS, *OWN_KEYS, *UNREAD])
            fix = f"did you mean {meant}?" if meant else _choices()
            yield Problem(key, value, "is no field of Megatron-Core 0.16.1's TransformerConfig", fix)
        else:
            yield from _field_problems(setting, name, value)


def _choices() -> str:
    return f"set one of {', '.join(FIELDS)}"


def _field_problems(setting: ModelSetting, name: str, value: Scalar) -> Iterator[Problem]:
    (allowed, values), (has_effect, needed) = FIELDS[name].allowed, FIELDS[name].needs
    key = f"{_OVERRIDES}.{name}"
    if not allowed(value):
        yield Problem(key, value, f"must be {values}", f"write {key}=<{values}>, or remove it")
    elif value is not False and not has_effect(setting):
        yield Problem(key, value, f"has an effect with {needed} alone", f"choose that, or remove {key}")


def check_unread_keys(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Keys of the model that are read only beside others, and were given though those are absent."""
    model = setting.model
    if model.position_embedding_type != "rope":
        for name in ("rotary_base", "rotary_percent"):
            default, value = DEFAULTS[name], getattr(model, name)
            if value != default:
                rule = (
                    f"is read with rotary positions, and model.position_embedding_type={model.position_embedding_type}"
                )
                yield Problem(f"model.{name}", value, rule, f"set model.{name}={default}, or rotary positions")
    if model.window_attn_skip_freq is not None:
        yield from _skipped_windows(model.window_size, model.window_attn_skip_freq)
    if model.qk_layernorm_scope != "head" and not model.qk_layernorm:
        rule = "is read with model.qk_layernorm=true"
        fix = "set model.qk_layernorm_scope=head, or model.qk_layernorm=true"
        yield Problem("model.qk_layernorm_scope", model.qk_layernorm_scope, rule, fix)
    if model.qk_layernorm and model.qk_layernorm_scope == "all" and model.layernorm_zero_centered_gamma:
        rule = "norms over all heads at once (model.qk_layernorm_scope=all) have plain weights"
        yield Problem("model.layernorm_zero_centered_gamma", True, rule, "set it to false, or the scope to head")
    if model.mla is not None and model.kv_channels is not None:
        rule = "latent attention has sizes of its own (model.mla)"
        yield Problem("model.kv_channels", model.kv_channels, rule, "set model.kv_channels=null")
    yield from _unread_scaling(model)
    if model.moe is not None:
        yield from _unread_by_experts(setting, model.moe)


def _skipped_windows(window: int | None, frequency: int) -> Iterator[Problem]:
    key = "model.window_attn_skip_freq"
    if window is None:
        rule = "says which layers go without the window, and model.window_size is null"
        yield Problem(key, frequency, rule, f"set model.window_size, or {key}=null")
    elif frequency == 1:
        rule = "lets every layer go without the window of model.window_size"
        yield Problem(key, frequency, rule, f"set {key}=null for a window in each layer, or model.window_size=null")


def _unread_scaling(model: ModelConfig) -> Iterator[Problem]:
    scaling = model.rope_scaling
    if scaling is None:
        return
    for name in sorted({name for names in SCALING_FIELDS.values() for name in names}):
        value, key = getattr(scaling, name), f"model.rope_scaling.{name}"
        if value is None:
            continue
        if name not in SCALING_FIELDS[scaling.type]:
            yield Problem(key, value, f"is not read by type {scaling.type}", f"set {key}=null")
        elif name == "attention_factor" and model.mla is not None:
            yield Problem(key, value, "latent attention computes it from mscale and mscale_all_dim", f"set {key}=null")


def _unread_by_experts(setting: ModelSetting, moe: MoeConfig) -> Iterator[Problem]:
    key, balancing = "model.moe", moe.moe_router_load_balancing_type
    coeff = moe.moe_aux_loss_coeff
    if balancing in ("none", "sinkhorn") and coeff not in (0.0, DEFAULTS["moe_aux_loss_coeff"]):
        rule = f"is the weight of a loss that moe_router_load_balancing_type={balancing} does not have"
        yield Problem(f"{key}.moe_aux_loss_coeff", coeff, rule, "set it to 0, or choose aux_loss")
    if moe.moe_router_score_function == "sigmoid" and balancing == "sinkhorn":
        rule = "sinkhorn has scores of its own"
        yield Problem(f"{key}.moe_router_score_function", "sigmoid", rule, "choose softmax, or another balancing")
    if moe.moe_router_pre_softmax and (moe.moe_router_score_function == "sigmoid" or balancing == "sinkhorn"):
        rule = "orders softmax and top-k, and the scores are of another kind (sigmoid, or sinkhorn's)"
        yield Problem(f"{key}.moe_router_pre_softmax", True, rule, f"set {key}.moe_router_pre_softmax=false")
    if not any(map(moe.has_layer, range(setting.model.num_layers))):
        first = moe.moe_first_k_dense_replace
        rule = f"leaves none of the {setting.model.num_layers} layers to the experts"
        yield Problem(f"{key}.moe_first_k_dense_replace", first, rule, "set it lower, or model.moe=null")


EFFECT_CHECKS = (check_overrides, check_unread_keys)
