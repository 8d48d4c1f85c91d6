"""Checks of the model: what its parts cannot be joined with."""

import re
from collections.abc import Iterator

from nemo_llm.config.sections.model import MoeConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.errors import Problem


def check_latent_attention(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """What latent attention cannot be joined with."""
    model, tp = setting.model, setting.parallelism.tensor_model_parallel_size
    if model.mla is None:
        return
    mla = {"q_lora_rank": model.mla.q_lora_rank or tp, "kv_lora_rank": model.mla.kv_lora_rank}
    mla["kv_lora_rank"] += model.mla.qk_pos_emb_head_dim
    for name, rows in mla.items():
        if rows % tp:
            rule = f"makes a projection of {rows} rows, which tensor_model_parallel_size = {tp} does not divide"
            yield Problem(f"model.mla.{name}", rows, rule, "choose another, or a smaller tensor_model_parallel_size")
    if model.position_embedding_type != "rope" or model.rotary_percent != 1.0:
        rule = "latent attention has rotary positions, on channels of their own"
        yield Problem(
            "model.position_embedding_type", model.position_embedding_type, rule, "use rope, rotary_percent 1"
        )
    if model.rope_scaling is not None and model.rope_scaling.type != "yarn":
        rule = "latent attention knows yarn alone"
        yield Problem("model.rope_scaling.type", model.rope_scaling.type, rule, "choose yarn, or rope_scaling=null")
    if model.num_query_groups != model.num_attention_heads:
        rule = "latent attention makes keys for every head"
        yield Problem("model.num_query_groups", model.num_query_groups, rule, f"set it to {model.num_attention_heads}")
    if setting.peft is not None:
        yield Problem("peft.kind", setting.peft.kind, "adapters do not know latent attention yet", "train all weights")
    if setting.precision.fp8 is not None:
        rule = "latent attention has no FP8 products"
        yield Problem("precision.fp8", setting.precision.fp8.fp8_recipe, rule, "choose precision=bf16")
    for key in ("qk_layernorm", "add_qkv_bias", "softmax_scale", "attn_logit_softcapping", "rotary_local_base"):
        value = getattr(model, key)
        if value:
            unset = "false" if value is True else "null"
            yield Problem(f"model.{key}", value, "latent attention does not have it", f"set model.{key}={unset}")


def check_mixture(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """What Megatron refuses about mixtures of experts, said before it does."""
    model, moe = setting.model, setting.model.moe
    if moe is None:
        return
    if model.add_bias_linear:
        rule = "a mixture of experts has no biases in its linear layers"
        yield Problem("model.add_bias_linear", True, rule, "set model.add_bias_linear=false")
    yield from _check_balancing(setting, moe)
    needs_pre = moe.moe_router_topk == 1 and moe.moe_router_score_function == "softmax"
    if needs_pre and not moe.moe_router_pre_softmax and moe.moe_router_load_balancing_type != "sinkhorn":
        yield Problem(
            "model.moe.moe_router_pre_softmax",
            False,
            "with moe_router_topk = 1 the softmax over the one chosen expert is always 1, so the router cannot learn",
            "set model.moe.moe_router_pre_softmax=true",
        )


def _check_balancing(setting: ModelSetting, moe: MoeConfig) -> Iterator[Problem]:
    """Ways of balancing experts whose result would depend on how ranks share the tokens."""
    key, kind = "model.moe.moe_router_load_balancing_type", moe.moe_router_load_balancing_type
    if kind == "global_aux_loss":
        rule = "balances over the data-parallel ranks there are and over micro-batches so far: no layout equals another"
        yield Problem(key, kind, rule, f"set {key}=aux_loss (a micro-batch) or seq_aux_loss (a sequence)")
    if kind == "sinkhorn" and moe.moe_aux_loss_coeff > 0.0:
        rule = f"needs no loss beside {key}=sinkhorn, and Megatron takes none"
        yield Problem(
            "model.moe.moe_aux_loss_coeff", moe.moe_aux_loss_coeff, rule, "set model.moe.moe_aux_loss_coeff=0.0"
        )
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        if kind == "sinkhorn" and (size := getattr(setting.parallelism, name)) > 1:
            rule = f"sinkhorn balances the tokens of one rank, and parallelism.{name} = {size} splits a sequence"
            yield Problem(key, kind, rule, f"set parallelism.{name}=1, or {key}=aux_loss")


def check_layer_spec(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """A user's own layer is named as package.module:function; settings without a layer would be read by nobody."""
    spec, settings = setting.model.layer_spec, setting.model.layer_spec_settings
    if spec is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", spec):
        rule = "must have the form package.module:function"
        yield Problem("model.layer_spec", spec, rule, "write for example my_package.layers:build_spec")
    if spec is None and settings:
        rule = "is handed to model.layer_spec, which is null"
        yield Problem("model.layer_spec_settings", settings, rule, "set model.layer_spec, or leave the settings empty")


def check_rope_scaling(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Each way of stretching the rotary wavelengths has the numbers that it reads."""
    scaling = setting.model.rope_scaling
    if scaling is None:
        return
    if setting.model.position_embedding_type != "rope":
        value = setting.model.position_embedding_type
        rule = "model.rope_scaling stretches rotary positions, and the model has others"
        yield Problem("model.position_embedding_type", value, rule, "set model.rope_scaling=null")
    if scaling.type == "yarn" and setting.model.rotary_percent != 1.0:
        rule = "YaRN is built for heads that are rotated as a whole"
        yield Problem("model.rotary_percent", setting.model.rotary_percent, rule, "set model.rotary_percent=1.0")
    needed = {
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("original_max_position_embeddings",),
        "dynamic": ("original_max_position_embeddings",),
        "linear": (),
    }[scaling.type]
    given = {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    for name in needed:
        if given[name] is None:
            key = f"model.rope_scaling.{name}"
            yield Problem(
                key, None, f"type {scaling.type} needs it", f"set {key} as the model's published config has it"
            )


def check_rotary_local_base(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Rotary angles of layers with a window need both."""
    model = setting.model
    if model.rotary_local_base is None:
        return
    for key, value, missing in (
        ("model.position_embedding_type", model.position_embedding_type, model.position_embedding_type != "rope"),
        ("model.window_size", model.window_size, model.window_size is None),
    ):
        if missing:
            rule = "model.rotary_local_base turns positions in layers with a window"
            yield Problem(key, value, rule, "set model.rotary_local_base=null")


MODEL_CHECKS = (check_latent_attention, check_mixture, check_layer_spec, check_rope_scaling, check_rotary_local_base)
