"""The only builder of Megatron-Core's ``TransformerConfig``: our sections in, one mcore object out."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from nemo_llm.config import ModelConfig, ParallelismConfig, PrecisionConfig
from nemo_llm.config.checks.code_paths import fuses_rope, splits_qkv
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.megatron import models as megatron
from nemo_llm.megatron.config_fields import UNFUSED_ACTIVATION
from nemo_llm.models.layers.main_grad import accumulate
from nemo_llm.models.layers.rope import rotate_fused, split_and_rotate
from nemo_llm.models.layers.rope_scaling import attention_factor
from nemo_llm.models.specs import choose_backend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """``relu(x)^2`` (Primer, arXiv:2109.08668)."""
    return torch.square(F.relu(x))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": squared_relu,
}


def to_transformer_config(setting: ModelSetting, device: torch.device) -> TransformerConfig:
    """Translate the model, parallelism and precision sections.

    Values are handed on as they are; nothing is derived here that a user could have set. ``model.mcore_overrides``
    (megatron/config_fields.py says which) is applied last.

    Raises:
        ConfigError: a combination that Megatron refuses.
    """
    megatron.define_missing_names()
    fuse_rope = device.type == "cuda" and fuses_rope(setting)
    if setting.performance.gradient_accumulation_fusion:
        megatron.offer_gradient_accumulation(accumulate)
    if setting.parallelism.recompute_granularity == "selective":
        megatron.offer_norm_recomputation()
    if fuse_rope:
        megatron.offer_fused_rope(rotate_fused)
    if device.type == "cuda" and setting.performance.fused_kernels:
        megatron.offer_fused_swiglu(swiglu)
    fuse_qkv = device.type == "cuda" and splits_qkv(setting)
    if fuse_qkv:
        megatron.offer_fused_qkv(split_and_rotate)
    fields = {
        **_model_fields(setting.model),
        **_moe_fields(setting.model),
        **_mla_fields(setting.model),
        **_parallel_fields(setting.parallelism, device),
        **_precision_fields(setting.precision, choose_backend(setting.model, device.type)),
        "deterministic_mode": setting.deterministic,
        "gradient_accumulation_fusion": setting.performance.gradient_accumulation_fusion,
        "apply_rope_fusion": fuse_rope,
        "fused_single_qkv_rope": fuse_qkv,
        "bias_activation_fusion": device.type == "cuda" and _fuses_activation(setting.model),
        "bias_dropout_fusion": device.type == "cuda",
    }
    class_ = TransformerConfig if setting.model.mla is None else MLATransformerConfig
    try:
        return class_(**{**fields, **setting.model.mcore_overrides})
    except (ValueError, AssertionError, NotImplementedError) as error:
        rule = f"Megatron-Core refuses this combination: {error}"
        raise ConfigError([Problem("model", setting.model.name, rule, "change the keys named")]) from error


def _fuses_activation(model: ModelConfig) -> bool:
    """Whether the activation goes with the bias in one kernel on CUDA, which keeps one tensor less for backward.

    mcore's other fused activations are the tanh approximation whatever was asked for, so they stay off. The kernel is
    compiled, which does not pay on CPU.
    """
    plain = not set(UNFUSED_ACTIVATION) & set(model.mcore_overrides)
    return plain and model.activation_func == "silu" and model.gated_linear_unit


def _model_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "layernorm_zero_centered_gamma": model.layernorm_zero_centered_gamma,
        "activation_func": ACTIVATIONS[model.activation_func],
        "gated_linear_unit": model.gated_linear_unit,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        # Megatron sums the gradients of these norms over TP, which is right where every rank has the whole weight.
        "qk_layernorm": model.qk_layernorm and model.qk_layernorm_scope == "head",
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "softmax_scale": softmax_scale(model),
        # Megatron counts the tokens to the left of the present one; our window includes the token itself.
        "window_size": None if model.window_size is None else (model.window_size - 1, 0),
        "window_attn_skip_freq": model.window_attn_skip_freq,
        "init_method_std": model.init_method_std,
        # Weights are drawn by name and global position (models/initialize.py), so that no layout changes them.
        "perform_initialization": False,
        "masked_softmax_fusion": False,
        "attention_softmax_in_fp32": False,
        # The loss of a step is summed over tokens and divided once, by the token count of the whole global batch.
        "calculate_per_token_loss": True,
    }


def softmax_scale(model: ModelConfig) -> float | None:
    """YaRN's factor on queries and keys is one on the logits: all channels are rotated (config/checks/model.py)."""
    factor = attention_factor(model.rope_scaling)
    if factor == 1.0:
        return model.softmax_scale
    return (model.softmax_scale or model.head_dim**-0.5) * factor**2


def _moe_fields(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {}
    fields = dataclasses.asdict(moe)
    if fields.pop("moe_first_k_dense_replace"):
        fields["moe_layer_freq"] = [int(moe.has_layer(number)) for number in range(model.num_layers)]
    elif moe.moe_layer_freq == 1:
        del fields["moe_layer_freq"]
    return fields


def _mla_fields(model: ModelConfig) -> dict[str, Any]:
    """Latent attention, whose rotary positions Megatron scales by itself (config/checks/model.py: by YaRN alone)."""
    if model.mla is None:
        return {}
    fields = {**dataclasses.asdict(model.mla), "rotary_base": model.rotary_base, "softmax_scale": None}
    scaling = model.rope_scaling
    if scaling is None:
        return {**fields, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        **fields,
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast or 32.0,
        "beta_slow": scaling.beta_slow or 1.0,
        "mscale": scaling.mscale or 1.0,
        "mscale_all_dim": scaling.mscale_all_dim or 0.0,
    }


def _parallel_fields(layout: ParallelismConfig, device: torch.device) -> dict[str, Any]:
    selective = layout.recompute_granularity == "selective"
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_layout": layout.pipeline_model_parallel_layout,
        "context_parallel_size": layout.context_parallel_size,
        "cp_comm_type": layout.cp_comm_type,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "recompute_granularity": layout.recompute_granularity,
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
        "recompute_modules": list(layout.recompute_modules) if selective else None,
        "variable_seq_lengths": False,
        # Batched sends and receives between the same two ranks pair up by order alone: with interleaving over two
        # stages the forward and the backward tensors would swap. Megatron keeps them apart when they are overlapped.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Frees a sent activation at once. gloo still reads it then: only a CUDA stream orders the two.
        "deallocate_pipeline_outputs": device.type == "cuda",
    }


def _precision_fields(precision: PrecisionConfig, backend: str) -> dict[str, Any]:
    dtype = DTYPES[precision.params_dtype]
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    # Megatron's FP8 is Transformer Engine's; the torch backend has linear modules of its own (models/layers/fp8.py).
    if precision.fp8 is not None and backend == "transformer_engine":
        fields.update(
            fp8=precision.fp8.fp8,
            fp8_recipe=precision.fp8.fp8_recipe,
            fp8_amax_history_len=precision.fp8.fp8_amax_history_len,
            fp8_amax_compute_algo=precision.fp8.fp8_amax_compute_algo,
            fp8_param=precision.fp8.fp8_param,
        )
    return fields


def swiglu(x: torch.Tensor, bias: torch.Tensor | None, *storage: Any) -> torch.Tensor:
    """``[..., 2f]`` and ``[2f]`` -> ``[..., f]``; ``storage``: Megatron's ways to keep the input, its own here too."""
    if any(storage) or not x.is_cuda:
        return bias_swiglu_impl(x, bias, *storage)
    from nemo_llm.kernels.norm_swiglu import FusedSwiGLU

    return FusedSwiGLU.apply(x.flatten(0, -2), bias).view(*x.shape[:-1], -1)
