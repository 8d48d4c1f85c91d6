"""What `model.mcore_overrides` may set: every field of Megatron-Core 0.16.1's configuration of a transformer.

*Numbers* change the arithmetic, *speed or memory* leaves it. The rest is refused: a key of ours sets it, or nothing
here reads it. tests/megatron/test_config_fields.py holds the table beside Megatron's classes and tries every field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

_OWN_MODEL_KEYS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization "
    "layernorm_epsilon layernorm_zero_centered_gamma activation_func gated_linear_unit add_bias_linear add_qkv_bias "
    "qk_layernorm hidden_dropout attention_dropout softmax_scale window_size window_attn_skip_freq init_method_std "
    "transformer_impl rotary_base rotary_percent"
)
_OWN_MOE_KEYS = (
    "num_moe_experts moe_router_topk moe_ffn_hidden_size moe_aux_loss_coeff moe_z_loss_coeff "
    "moe_router_load_balancing_type moe_router_score_function moe_router_pre_softmax moe_token_dispatcher_type "
    "moe_shared_expert_intermediate_size moe_layer_freq moe_grouped_gemm"
)
_OWN_MLA_KEYS = "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim"
_OWN_LAYOUT_KEYS = (
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel "
    "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size pipeline_model_parallel_layout "
    "cp_comm_type recompute_granularity recompute_method recompute_num_layers recompute_modules"
)
_OWN_SCALING_KEYS = "original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim"
_OWN_FP8_KEYS = "fp8 fp8_recipe fp8_param fp8_amax_history_len fp8_amax_compute_algo"

OWN_KEYS: dict[str, str] = {
    **{name: f"model.{name}" for name in _OWN_MODEL_KEYS.split()},
    **{name: f"model.moe.{name}" for name in _OWN_MOE_KEYS.split()},
    **{name: f"model.mla.{name}" for name in _OWN_MLA_KEYS.split()},
    **{name: f"parallelism.{name}" for name in _OWN_LAYOUT_KEYS.split()},
    **{name: f"model.rope_scaling.{name}" for name in _OWN_SCALING_KEYS.split()},
    **{name: f"precision.fp8.{name}" for name in _OWN_FP8_KEYS.split()},
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), "precision.params_dtype"),
    **dict.fromkeys(("autocast_dtype", "enable_autocast"), "precision.params_dtype"),
    **dict.fromkeys(("embedding_init_method", "embedding_init_method_std"), "model.init_method_std"),
    **dict.fromkeys(("init_method", "output_layer_init_method"), "model.init_method_std and model.depth_scaled_init"),
    **dict.fromkeys(("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
                     "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
                    "parallelism.pipeline_model_parallel_layout"),
    **dict.fromkeys(("cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_activations",
                     "fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size"),
                    "performance.offload_activation_layers"),
    **dict.fromkeys(("cross_entropy_loss_fusion", "cross_entropy_fusion_impl"),
                    "performance.fused_linear_cross_entropy"),
    **dict.fromkeys(("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "persist_layer_norm",
                     "memory_efficient_layer_norm"), "performance.fused_kernels"),
    **dict.fromkeys(("apply_rope_fusion", "fused_single_qkv_rope"), "performance.fused_rope"),
    "multi_latent_attention": "model.mla",
    "rope_type": "model.rope_scaling.type",
    "rotary_scaling_factor": "model.rope_scaling.factor",
    "moe_layer_recompute": "parallelism.recompute_modules",
    "moe_router_topk_limited_devices": "model.mcore_overrides.moe_router_num_groups",
    "deterministic_mode": "trainer.deterministic",
    "gradient_accumulation_fusion": "performance.gradient_accumulation_fusion",
    "attention_backend": "model.transformer_impl",
}  # fmt: skip
"""Fields that a key of ours sets, or decides in Megatron's place."""

NOT_BUILT = "is not built here"

_NOT_READ = {
    "sets how processes talk, which this project starts itself": (
        "pipeline_model_parallel_comm_backend hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank "
        "hybrid_context_parallel moe_extended_tp use_cpu_initialization perform_initialization timers "
        "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func variable_seq_lengths "
        "overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs "
        "overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage barrier_with_L1_time "
        "async_tensor_model_parallel_allreduce defer_embedding_wgrad_compute wgrad_deferral_limit "
        "overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release "
        "clone_scatter_output_in_embedding calculate_per_token_loss init_model_with_meta_device config_logger_dir "
        "test_mode distribute_saved_activations num_microbatches_with_partial_activation_checkpoints symmetric_ar_type"
    ),
    "needs parts of Transformer Engine or apex that this project does not start": (
        "tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs "
        "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs "
        "tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend use_te_rng_tracker "
        "inference_rng_tracker _cpu_offloading_context cpu_offloading_weights cpu_offloading_double_buffering "
        "activation_func_fp8_input_store disable_parameter_transpose_cache use_te_activation_func "
        "use_fused_weighted_squared_relu fp8_quantizer_factory fp8_margin fp8_interval fp8_wgrad "
        "fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 "
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention "
        "kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory quant_recipe moe_permute_fusion "
        "moe_router_fusion moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_latent_size "
        "moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms "
        "moe_use_legacy_grouped_gemm"
    ),
    NOT_BUILT: (
        "mtp_num_layers mtp_loss_scaling_factor mtp_standalone softmax_type qk_l2_norm qk_clip qk_clip_alpha "
        "qk_clip_threshold log_max_attention_logit attention_output_gate rotary_interleaved fp32_residual_connection "
        "apply_residual_connection_post_layernorm apply_query_key_layer_scaling attention_softmax_in_fp32 "
        "experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk "
        "dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads mrope_section "
        "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path "
        "heterogeneous_block_specs hetereogenous_dist_checkpoint moe_enable_routing_replay moe_token_dropping "
        "moe_per_layer_logging enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph "
        "cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl cuda_graph_scope "
        "disable_bf16_reduced_precision_matmul"
    ),
    "draws random numbers that a resumed run would not draw again": (
        "moe_input_jitter_eps moe_router_force_load_balancing"
    ),
    "is for Megatron's own inference, which is not used here": (
        "flash_decode batch_invariant_mode use_inference_optimized_layers inference_fuse_tp_communication "
        "mlp_chunks_for_prefill cache_mla_latents inference_sampling_seed"
    ),
}
UNREAD: dict[str, str] = {name: why for why, names in _NOT_READ.items() for name in names.split()}
"""Fields that have no effect here or cannot work, and why."""
