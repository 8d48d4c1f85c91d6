"""Layer specs: which module Megatron builds for each part of a transformer layer.

Two backends share one builder. ``torch`` is ours and runs on CPU and GPU; ``transformer_engine`` takes NVIDIA's
kernels. A user's own spec comes in through ``model.layer_spec`` without a fork.
"""

import importlib
import importlib.util
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from nemo_llm.config import ModelConfig
from nemo_llm.config.checks.code_paths import keys_of_own_layers, why_no_flex
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.models.layers.attention import CoreAttention, LocalRotaryAttention
from nemo_llm.models.layers.experts import experts_spec
from nemo_llm.models.layers.fp8 import LINEARS
from nemo_llm.models.layers.latent_attention import LatentAttention
from nemo_llm.models.layers.linear import WholeColumnLinear, WholeRowLinear
from nemo_llm.models.layers.norm import Norm
from nemo_llm.models.layers.norm_variants import FusedLayer, ParallelResidualLayer, WholeWidthNorm, with_post_norm
from nemo_llm.models.layers.router import use_own_router


class TorchBackend(LocalSpecProvider):
    """The parts of a layer on machines without Transformer Engine."""

    def __init__(self, setting: ModelSetting, linears: tuple[type, type]) -> None:
        self.model, self.performance = setting.model, setting.performance
        self.column, self.row = linears
        self.flex_length = setting.seq_length if why_no_flex(setting) is None else None

    def column_parallel_linear(self) -> type:
        return self.column

    def row_parallel_linear(self) -> type:
        return self.row if self.model.norm_placement == "pre" else with_post_norm(self.row)

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> Any:
        if for_qk and self.model.mla is not None:
            return Norm  # of a part of a projection's output: the kernel would read a copy
        return ModuleSpec(module=Norm, params={"fused": self.performance.fused_kernels})

    def qk_norm(self, heads: int, tp_group: Any) -> Any:
        """The norm of queries or of keys, of which the model has ``heads``."""
        if not self.model.qk_layernorm:
            return IdentityOp
        if self.model.qk_layernorm_scope == "head":
            return self.layer_norm(for_qk=True)
        return ModuleSpec(module=WholeWidthNorm, params={"heads": heads, "tp_group": tp_group})

    def core_attention(self) -> Any:
        return partial(
            CoreAttention,
            logit_softcapping=self.model.attn_logit_softcapping,
            flex_length=self.flex_length,
        )


_NAMES_BEFORE_QKV = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_NAMES_IN_LATENT_ATTENTION = {
    f"self_attention.{part}_layernorm.": f"self_attention.linear_{part}_up_proj.layer_norm_" for part in ("q", "kv")
}
_NAMES_BEFORE_MLP = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _checkpoint_names(latent: bool, moe: bool) -> dict[str, str]:
    return (_NAMES_IN_LATENT_ATTENTION if latent else _NAMES_BEFORE_QKV) | ({} if moe else _NAMES_BEFORE_MLP)


def choose_backend(model: ModelConfig, device_type: str) -> str:
    """``torch`` or ``transformer_engine``; ``auto`` takes Transformer Engine where it is installed and a GPU is used.

    Raises:
        ConfigError: Transformer Engine asked for where it cannot run.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    own = keys_of_own_layers(model)
    if own and model.transformer_impl == "transformer_engine":
        problem = Problem(
            "model.transformer_impl", "transformer_engine", f"{', '.join(own)} is built by torch alone", "use auto"
        )
        raise ConfigError([problem])
    if own:
        return "torch"
    if model.transformer_impl == "transformer_engine" and (device_type != "cuda" or not installed):
        reason = "needs a CUDA device" if device_type != "cuda" else "is not installed (extra `te`)"
        raise ConfigError(
            [
                Problem(
                    "model.transformer_impl", "transformer_engine", f"Transformer Engine {reason}", "use torch or auto"
                )
            ]
        )
    if model.transformer_impl == "auto":
        return "transformer_engine" if installed and device_type == "cuda" else "torch"
    return model.transformer_impl


def build_block_spec(
    setting: ModelSetting, config: TransformerConfig, backend: str, vp_stage: int | None, groups: Any
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, as a Megatron block spec.

    Args:
        groups: Megatron's process groups.
    """
    block = _block_spec(setting, config, backend, vp_stage, groups)
    use_own_router(block)
    return block


def _block_spec(
    setting: ModelSetting, config: TransformerConfig, backend: str, vp_stage: int | None, groups: Any
) -> TransformerBlockSubmodules:
    model = setting.model
    pp_rank = groups.pp.rank()
    if model.layer_spec is not None:
        return _users_block_spec(model, config, vp_stage)
    if backend == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    parts, moe_parts = (TorchBackend(setting, _linears(setting, moe)) for moe in (False, True))
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    has_experts = [model.moe is not None and model.moe.has_layer(offset + i) for i in range(count)]
    layers = [_torch_layer_spec(setting, parts, moe_parts if moe else None, config, groups.tp) for moe in has_experts]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=parts.layer_norm())


def _linears(setting: ModelSetting, moe: bool) -> tuple[type, type]:
    """The column-parallel and the row-parallel linear layer, in an MLP of experts or elsewhere."""
    if setting.precision.fp8 is not None:
        return LINEARS[setting.precision.fp8.fp8]
    # Experts take another number of tokens each time, for which no kernel is chosen; and Megatron's latent attention
    # has a list of the classes that it takes.
    split = setting.parallelism.tensor_model_parallel_size > 1
    if split or moe or setting.model.mla is not None or not setting.performance.gradient_accumulation_fusion:
        return ColumnParallelLinear, RowParallelLinear
    return WholeColumnLinear, WholeRowLinear


def _layer_class(model: ModelConfig) -> type:
    if model.parallel_residual:
        return ParallelResidualLayer
    return TransformerLayer if model.norm_placement == "post" else FusedLayer


def _torch_layer_spec(
    setting: ModelSetting, parts: TorchBackend, moe_parts: TorchBackend | None, config: TransformerConfig, tp_group: Any
) -> ModuleSpec:
    """One layer; ``moe_parts`` are those of its experts, if it has any."""
    model = parts.model
    pre_norm = IdentityOp if model.norm_placement == "post" else parts.layer_norm()
    mlp = get_mlp_module_spec_for_backend(
        backend=moe_parts or parts, num_experts=config.num_moe_experts if moe_parts else None, moe_grouped_gemm=False
    )
    return ModuleSpec(
        module=_layer_class(model),
        submodules=TransformerLayerSubmodules(
            input_layernorm=pre_norm,
            self_attention=_self_attention(parts, tp_group) if model.mla is None else _latent_attention(parts),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_norm,
            mlp=experts_spec(mlp, setting) if moe_parts else mlp,
            mlp_bda=get_bias_dropout_add,
            # Checkpoint names as Transformer Engine's fused modules have them: one checkpoint serves both backends.
            sharded_state_dict_keys_map=_checkpoint_names(model.mla is not None, moe_parts is not None),
        ),
    )


def _self_attention(parts: TorchBackend, tp_group: Any) -> ModuleSpec:
    model = parts.model
    return ModuleSpec(
        module=SelfAttention if model.rotary_local_base is None else LocalRotaryAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_parallel_linear(),
            core_attention=parts.core_attention(),
            linear_proj=parts.row_parallel_linear(),
            q_layernorm=parts.qk_norm(model.num_attention_heads, tp_group),
            k_layernorm=parts.qk_norm(model.num_query_groups, tp_group),
        ),
    )


def _latent_attention(parts: TorchBackend) -> ModuleSpec:
    column = parts.column_parallel_linear()
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=CoreAttention,
            linear_proj=parts.row_parallel_linear(),
            q_layernorm=parts.layer_norm(),
            kv_layernorm=parts.layer_norm(),
        ),
    )


def _users_block_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Call ``package.module:function(config, vp_stage, **model.layer_spec_settings)``."""
    module_name, _, function_name = str(model.layer_spec).partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        problem = Problem(
            "model.layer_spec", model.layer_spec, f"cannot be imported: {error}", "write package.module:function"
        )
        raise ConfigError([problem]) from error
    return function(config, vp_stage, **model.layer_spec_settings)
