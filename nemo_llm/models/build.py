"""Build this rank's part of a model: the chunks of its pipeline stage, initialised and ready to be wrapped."""

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_llm.config.checks.code_paths import fused_chunk_tokens
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.models.initialize import InitRule, initialize_weights
from nemo_llm.models.language_model import LanguageModel
from nemo_llm.models.layers.activation_offload import offload_activations
from nemo_llm.models.layers.experts import use_local_dispatcher
from nemo_llm.models.specs import build_block_spec, choose_backend
from nemo_llm.models.transformer_config import to_transformer_config
from nemo_llm.parallel.runtime import ParallelRuntime


def build_model_chunks(setting: ModelSetting, runtime: ParallelRuntime, vocab_size: int) -> list[torch.nn.Module]:
    """One module for each virtual pipeline stage of this rank (one without interleaving), weights initialised.

    Args:
        vocab_size: tokens known to the tokenizer; ``model.vocab_size`` when that is given.
    """
    config = to_transformer_config(setting, runtime.device)
    backend = choose_backend(setting.model, runtime.device.type)
    _check_fp8_device(setting, runtime.device)
    virtual_stages = config.virtual_pipeline_model_parallel_size or 1
    chunks = [
        _build_chunk(setting, runtime, config, backend, vp if virtual_stages > 1 else None, vocab_size)
        for vp in range(virtual_stages)
    ]
    residual_scale = 1.0 / math.sqrt(2.0 * setting.model.num_layers) if setting.model.depth_scaled_init else 1.0
    std = setting.model.init_method_std
    norm_weight = 0.0 if setting.model.layernorm_zero_centered_gamma else 1.0
    initialize_weights(chunks, setting.seed, InitRule(std, std * residual_scale, norm_weight))
    if config.fp16 or config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    return chunks


def _check_fp8_device(setting: ModelSetting, device: torch.device) -> None:
    if setting.precision.fp8 is None or device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device)
    rule = f"the tensor cores of {name} have no FP8"
    raise ConfigError([Problem("precision.fp8", setting.precision.fp8.fp8_recipe, rule, "choose precision=bf16")])


def _build_chunk(
    setting: ModelSetting,
    runtime: ParallelRuntime,
    config: TransformerConfig,
    backend: Any,
    vp_stage: int | None,
    vocab_size: int,
) -> LanguageModel:
    last_vp = (config.virtual_pipeline_model_parallel_size or 1) - 1
    stage = vp_stage or 0
    chunk = LanguageModel(
        config,
        build_block_spec(setting, config, backend, vp_stage, runtime.groups),
        setting.model,
        vocab_size,
        setting.z_loss_coeff,
        fused_chunk_tokens(setting),
        pre_process=runtime.pp_rank == 0 and stage == 0,
        post_process=runtime.is_last_pipeline_stage and stage == last_vp,
        vp_stage=vp_stage,
        pg_collection=runtime.groups,
    )
    _mark_split_parameters(chunk)
    _mark_experts(chunk, runtime)
    use_local_dispatcher(chunk, setting, runtime.groups)
    if setting.performance.compile_layers and runtime.device.type == "cuda":
        for layer in chunk.decoder.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    if setting.performance.offload_activation_layers:
        offload_activations(chunk.decoder.layers, setting.performance.offload_activation_layers)
    return chunk.to(runtime.device)


def _mark_split_parameters(chunk: LanguageModel) -> None:
    """Mark the parameters that tensor parallelism splits; Megatron does it as it draws weights, which it does not here.

    Without the mark they count as copies, once over all ranks, in the norm of the gradients.
    """
    for module in chunk.modules():
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            weight = module.weight  # None where the embedding serves as the output layer too
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                split_dim = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(weight, True, split_dim, 1)


def _mark_experts(chunk: LanguageModel, runtime: ParallelRuntime) -> None:
    """Mark the parameters of experts wherever their copies lie on other ranks than those of dense weights.

    By the mark (``allreduce``) Megatron sums gradients over the ranks that hold the same expert, and keeps its
    optimizer state there. Megatron sets it where EP is above 1. But with EP1 an expert tensor parallel size other than
    TP also makes other groups: the copies of an expert would then train apart (megatron/patches.toml, `expert_marks`).
    """
    if runtime.experts_have_own_groups:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                for parameter in module.experts.parameters():
                    parameter.allreduce = False
