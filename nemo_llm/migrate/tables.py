"""What keys of NeMo's launcher and arguments of Megatron-LM mean here: a table each, and why others are left out."""

from collections.abc import Mapping
from typing import Any

# Foreign key -> (our dotted key, codec of `import_config.CODECS`).
Table = Mapping[str, tuple[str, str]]

NEMO: Table = {
    "run.name": ("run.name", "text"),
    "trainer.num_nodes": ("trainer.num_nodes", "same"),
    "trainer.devices": ("trainer.devices", "same"),
    "trainer.precision": ("precision", "precision"),
    "trainer.max_steps": ("trainer.max_steps", "same"),
    "trainer.max_time": ("trainer.max_time_minutes", "duration"),
    "trainer.log_every_n_steps": ("trainer.log_interval", "same"),
    "trainer.val_check_interval": ("trainer.val_interval", "same"),
    "trainer.limit_val_batches": ("trainer.val_steps", "batches"),
    "trainer.gradient_clip_val": ("optim.clip_grad", "float"),
    "exp_manager.create_wandb_logger": ("exp_manager.create_wandb_logger", "same"),
    "model.micro_batch_size": ("trainer.micro_batch_size", "same"),
    "model.global_batch_size": ("trainer.global_batch_size", "same"),
    "model.rampup_batch_size": ("trainer.rampup_batch_size", "rampup"),
    "model.seed": ("trainer.seed", "same"),
    "model.deterministic_mode": ("trainer.deterministic", "same"),
    "model.tensor_model_parallel_size": ("parallelism.tensor_model_parallel_size", "same"),
    "model.pipeline_model_parallel_size": ("parallelism.pipeline_model_parallel_size", "same"),
    "model.virtual_pipeline_model_parallel_size": ("parallelism.virtual_pipeline_model_parallel_size", "same"),
    "model.context_parallel_size": ("parallelism.context_parallel_size", "same"),
    "model.expert_model_parallel_size": ("parallelism.expert_model_parallel_size", "same"),
    "model.sequence_parallel": ("parallelism.sequence_parallel", "same"),
    "model.activations_checkpoint_granularity": ("parallelism.recompute_granularity", "same"),
    "model.activations_checkpoint_method": ("parallelism.recompute_method", "same"),
    "model.activations_checkpoint_num_layers": ("parallelism.recompute_num_layers", "positive"),
    "model.num_layers": ("model.num_layers", "same"),
    "model.hidden_size": ("model.hidden_size", "same"),
    "model.ffn_hidden_size": ("model.ffn_hidden_size", "same"),
    "model.num_attention_heads": ("model.num_attention_heads", "same"),
    "model.num_query_groups": ("model.num_query_groups", "same"),
    "model.kv_channels": ("model.kv_channels", "same"),
    "model.max_position_embeddings": ("model.max_position_embeddings", "same"),
    "model.make_vocab_size_divisible_by": ("model.make_vocab_size_divisible_by", "same"),
    "model.init_method_std": ("model.init_method_std", "float"),
    "model.use_scaled_init_method": ("model.depth_scaled_init", "same"),
    "model.hidden_dropout": ("model.hidden_dropout", "float"),
    "model.attention_dropout": ("model.attention_dropout", "float"),
    "model.normalization": ("model.normalization", "nemo_norm"),
    "model.layernorm_epsilon": ("model.layernorm_epsilon", "float"),
    "model.bias": ("model.add_bias_linear", "same"),
    "model.qkv_bias": ("model.add_qkv_bias", "same"),
    "model.activation": ("model.activation_func", "nemo_activation"),
    "model.position_embedding_type": ("model.position_embedding_type", "positions"),
    "model.rotary_percentage": ("model.rotary_percent", "float"),
    "model.rotary_base": ("model.rotary_base", "float"),
    "model.seq_len_interpolation_factor": ("model.rope_scaling", "linear_rope"),
    "model.scale_positional_embedding": ("model.rope_scaling", "llama3_rope"),
    "model.layernorm_zero_centered_gamma": ("model.layernorm_zero_centered_gamma", "same"),
    "model.override_vocab_size": ("model.vocab_size", "same"),
    "model.window_size": ("model.window_size", "window"),
    "model.share_embeddings_and_output_weights": ("model.share_embeddings_and_output_weights", "same"),
    "model.qk_layernorm": ("model.qk_layernorm", "same"),
    "model.num_moe_experts": ("model.moe.num_moe_experts", "same"),
    "model.moe_router_topk": ("model.moe.moe_router_topk", "same"),
    "model.moe_aux_loss_coeff": ("model.moe.moe_aux_loss_coeff", "float"),
    "model.moe_z_loss_coeff": ("model.moe.moe_z_loss_coeff", "positive"),
    "model.moe_ffn_hidden_size": ("model.moe.moe_ffn_hidden_size", "same"),
    "model.moe_router_load_balancing_type": ("model.moe.moe_router_load_balancing_type", "same"),
    "model.moe_router_pre_softmax": ("model.moe.moe_router_pre_softmax", "same"),
    "model.moe_token_dispatcher_type": ("model.moe.moe_token_dispatcher_type", "same"),
    "model.moe_grouped_gemm": ("model.moe.moe_grouped_gemm", "same"),
    "model.moe_shared_expert_intermediate_size": ("model.moe.moe_shared_expert_intermediate_size", "positive"),
    "model.native_amp_init_scale": ("precision.initial_loss_scale", "float"),
    "model.native_amp_growth_interval": ("precision.loss_scale_window", "whole"),
    "model.hysteresis": ("precision.hysteresis", "same"),
    "model.optim.name": ("parallelism.use_distributed_optimizer", "nemo_optimizer"),
    "model.optim.lr": ("optim.lr", "float"),
    "model.optim.weight_decay": ("optim.weight_decay", "float"),
    "model.optim.betas": ("optim.adam_beta1, optim.adam_beta2", "pair"),
    "model.optim.overlap_grad_sync": ("parallelism.overlap_grad_reduce", "same"),
    "model.optim.overlap_param_sync": ("parallelism.overlap_param_gather", "same"),
    "model.optim.eps": ("optim.adam_eps", "float"),
    "model.optim.grad_sync_dtype": ("precision.grad_reduce_in_fp32", "gradients"),
    "model.optim.sched.name": ("optim.sched.name", "nemo_schedule"),
    "model.optim.sched.min_lr": ("optim.sched.min_lr", "float"),
    "model.data.seq_length": ("data.seq_length", "same"),
    "model.data.splits_string": ("data.split", "text"),
    "model.data.reset_position_ids": ("data.reset_position_ids", "same"),
    "model.data.reset_attention_mask": ("data.reset_attention_mask", "same"),
    "model.data.eod_mask_loss": ("data.eod_mask_loss", "same"),
    "model.data.data_prefix": ("data.blend", "blend"),
}

MEGATRON: Table = {
    "nproc-per-node": ("trainer.devices", "same"),
    "nnodes": ("trainer.num_nodes", "same"),
    "lr": ("optim.lr", "float"),
    "min-lr": ("optim.sched.min_lr", "float"),
    "lr-decay-style": ("optim.sched.name", "schedule"),
    "lr-wsd-decay-style": ("optim.sched.wsd_decay_style", "wsd_style"),
    "weight-decay": ("optim.weight_decay", "float"),
    "adam-beta1": ("optim.adam_beta1", "float"),
    "adam-beta2": ("optim.adam_beta2", "float"),
    "adam-eps": ("optim.adam_eps", "float"),
    "clip-grad": ("optim.clip_grad", "float"),
    "micro-batch-size": ("trainer.micro_batch_size", "same"),
    "global-batch-size": ("trainer.global_batch_size", "same"),
    "rampup-batch-size": ("trainer.rampup_batch_size", "rampup"),
    "seed": ("trainer.seed", "same"),
    "eval-interval": ("trainer.val_interval", "same"),
    "eval-iters": ("trainer.val_steps", "same"),
    "log-interval": ("trainer.log_interval", "same"),
    "save-interval": ("checkpoint.save_interval", "same"),
    "async-save": ("checkpoint.async_save", "same"),
    "exit-duration-in-mins": ("trainer.max_time_minutes", "float"),
    "distributed-timeout-minutes": ("trainer.first_step_timeout_minutes", "float"),
    "deterministic-mode": ("trainer.deterministic", "same"),
    "fp8-format": ("precision.fp8.fp8", "same"),
    "fp8-recipe": ("precision.fp8.fp8_recipe", "same"),
    "fp8-amax-history-len": ("precision.fp8.fp8_amax_history_len", "same"),
    "fp8-amax-compute-algo": ("precision.fp8.fp8_amax_compute_algo", "same"),
    "fp8-param-gather": ("precision.fp8.fp8_param", "same"),
    "grad-reduce-in-bf16": ("precision.grad_reduce_in_fp32", "not"),
    "accumulate-allreduce-grads-in-fp32": ("precision.grad_reduce_in_fp32", "same"),
    "initial-loss-scale": ("precision.initial_loss_scale", "float"),
    "min-loss-scale": ("precision.min_loss_scale", "float"),
    "loss-scale-window": ("precision.loss_scale_window", "whole"),
    "hysteresis": ("precision.hysteresis", "same"),
    "tensor-model-parallel-size": ("parallelism.tensor_model_parallel_size", "same"),
    "pipeline-model-parallel-size": ("parallelism.pipeline_model_parallel_size", "same"),
    "context-parallel-size": ("parallelism.context_parallel_size", "same"),
    "expert-model-parallel-size": ("parallelism.expert_model_parallel_size", "same"),
    "expert-tensor-parallel-size": ("parallelism.expert_tensor_parallel_size", "same"),
    "sequence-parallel": ("parallelism.sequence_parallel", "same"),
    "use-distributed-optimizer": ("parallelism.use_distributed_optimizer", "same"),
    "overlap-grad-reduce": ("parallelism.overlap_grad_reduce", "same"),
    "overlap-param-gather": ("parallelism.overlap_param_gather", "same"),
    "num-virtual-stages-per-pipeline-rank": ("parallelism.virtual_pipeline_model_parallel_size", "many"),
    "cp-comm-type": ("parallelism.cp_comm_type", "exchange"),
    "recompute-activations": ("parallelism.recompute_granularity", "flag:selective"),
    "recompute-modules": ("parallelism.recompute_modules", "names"),
    "recompute-granularity": ("parallelism.recompute_granularity", "same"),
    "recompute-method": ("parallelism.recompute_method", "same"),
    "recompute-num-layers": ("parallelism.recompute_num_layers", "same"),
    "num-layers": ("model.num_layers", "same"),
    "hidden-size": ("model.hidden_size", "same"),
    "ffn-hidden-size": ("model.ffn_hidden_size", "same"),
    "num-attention-heads": ("model.num_attention_heads", "same"),
    "num-query-groups": ("model.num_query_groups", "same"),
    "kv-channels": ("model.kv_channels", "same"),
    "vocab-size": ("model.vocab_size", "same"),
    "make-vocab-size-divisible-by": ("model.make_vocab_size_divisible_by", "same"),
    "max-position-embeddings": ("model.max_position_embeddings", "same"),
    "position-embedding-type": ("model.position_embedding_type", "positions"),
    "use-rotary-position-embeddings": ("model.position_embedding_type", "flag:rope"),
    "rotary-base": ("model.rotary_base", "float"),
    "rotary-seq-len-interpolation-factor": ("model.rope_scaling", "linear_rope"),
    "window-size": ("model.window_size", "window"),
    "window-attn-skip-freq": ("model.window_attn_skip_freq", "count"),
    "rotary-percent": ("model.rotary_percent", "float"),
    "normalization": ("model.normalization", "same"),
    "norm-epsilon": ("model.layernorm_epsilon", "float"),
    "apply-layernorm-1p": ("model.layernorm_zero_centered_gamma", "same"),
    "swiglu": ("model.gated_linear_unit, model.activation_func", "swiglu"),
    "squared-relu": ("model.activation_func", "flag:squared_relu"),
    "disable-bias-linear": ("model.add_bias_linear", "not"),
    "add-qkv-bias": ("model.add_qkv_bias", "same"),
    "untie-embeddings-and-output-weights": ("model.share_embeddings_and_output_weights", "not"),
    "qk-layernorm": ("model.qk_layernorm", "same"),
    "hidden-dropout": ("model.hidden_dropout", "float"),
    "attention-dropout": ("model.attention_dropout", "float"),
    "init-method-std": ("model.init_method_std", "float"),
    "num-experts": ("model.moe.num_moe_experts", "same"),
    "moe-router-topk": ("model.moe.moe_router_topk", "same"),
    "moe-ffn-hidden-size": ("model.moe.moe_ffn_hidden_size", "same"),
    "moe-aux-loss-coeff": ("model.moe.moe_aux_loss_coeff", "float"),
    "moe-z-loss-coeff": ("model.moe.moe_z_loss_coeff", "float"),
    "moe-router-load-balancing-type": ("model.moe.moe_router_load_balancing_type", "same"),
    "moe-router-score-function": ("model.moe.moe_router_score_function", "same"),
    "moe-router-pre-softmax": ("model.moe.moe_router_pre_softmax", "same"),
    "moe-token-dispatcher-type": ("model.moe.moe_token_dispatcher_type", "same"),
    "moe-shared-expert-intermediate-size": ("model.moe.moe_shared_expert_intermediate_size", "same"),
    "moe-grouped-gemm": ("model.moe.moe_grouped_gemm", "same"),
    "moe-layer-freq": ("model.moe.moe_layer_freq", "count"),
    "seq-length": ("data.seq_length", "same"),
    "split": ("data.split", "text"),
    "data-path": ("data.blend", "blend"),
    "reset-position-ids": ("data.reset_position_ids", "same"),
    "reset-attention-mask": ("data.reset_attention_mask", "same"),
    "eod-mask-loss": ("data.eod_mask_loss", "same"),
}

# What holds in the other project where a file says nothing, by its own keys.
# NeMo 1 (``cfg.get`` in its models, TransformerConfig, apex's FusedAdam).
NEMO_DEFAULTS: Mapping[str, Any] = {
    "model.activation": "gelu",
    "model.normalization": "layernorm",
    "model.layernorm_epsilon": 1e-5,
    "model.bias": True,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.init_method_std": 0.02,
    "model.use_scaled_init_method": True,
    "model.make_vocab_size_divisible_by": 128,
    "model.share_embeddings_and_output_weights": True,
    "model.position_embedding_type": "learned_absolute",
    "model.optim.betas": [0.9, 0.999],
    "model.optim.eps": 1e-8,
    "model.optim.weight_decay": 0.0,
    "model.optim.sched.min_lr": 0.0,
    "trainer.precision": "32",
    "trainer.gradient_clip_val": 0.0,
    "model.seed": 1234,
}
NEMO_MOE_DEFAULTS: Mapping[str, Any] = {
    "model.moe_router_topk": 2,
    "model.moe_aux_loss_coeff": 0.0,
    "model.moe_z_loss_coeff": None,
    "model.moe_router_load_balancing_type": "aux_loss",
    "model.moe_token_dispatcher_type": "allgather",
}
# Megatron-LM (megatron/training/arguments.py, as of core 0.15).
MEGATRON_DEFAULTS: Mapping[str, Any] = {
    "position-embedding-type": "learned_absolute",
    "rotary-base": 10000,
    "rotary-percent": 1.0,
    "normalization": "LayerNorm",
    "norm-epsilon": 1e-5,
    "hidden-dropout": 0.1,
    "attention-dropout": 0.1,
    "init-method-std": 0.02,
    "make-vocab-size-divisible-by": 128,
    "disable-bias-linear": False,
    "untie-embeddings-and-output-weights": False,
    "weight-decay": 0.01,
    "adam-beta1": 0.9,
    "adam-beta2": 0.999,
    "adam-eps": 1e-8,
    "clip-grad": 1.0,
    "lr-decay-style": "linear",
    "min-lr": 0.0,
    "seed": 1234,
    "eval-interval": 1000,
    "eval-iters": 100,
    "log-interval": 100,
    "sequence-parallel": False,
    "use-distributed-optimizer": False,
}
MEGATRON_MOE_DEFAULTS: Mapping[str, Any] = {
    "moe-router-topk": 2,
    "moe-aux-loss-coeff": 0.0,
    "moe-router-load-balancing-type": "aux_loss",
    "moe-router-score-function": "softmax",
    "moe-token-dispatcher-type": "allgather",
    "moe-layer-freq": 1,
}
MEGATRON_FP8_DEFAULTS: Mapping[str, Any] = {
    "fp8-recipe": "delayed",
    "fp8-amax-history-len": 1,
    "fp8-amax-compute-algo": "most_recent",
    "fp8-param-gather": False,
}
MEGATRON_FP16_DEFAULTS: Mapping[str, Any] = {
    "accumulate-allreduce-grads-in-fp32": False,
    "initial-loss-scale": 2.0**32,
    "min-loss-scale": 1.0,
    "loss-scale-window": 1000,
    "hysteresis": 2,
}
# Without these Megatron-LM itself does not begin.
MEGATRON_REQUIRED = ("lr", "micro-batch-size", "seq-length", "num-layers", "hidden-size", "num-attention-heads")

# Keys with the values that say what is done here anyway; any other value is unmapped.
NEMO_AS_HERE: Mapping[str, str] = {
    "trainer.accumulate_grad_batches": "1",
    "trainer.max_epochs": "None -1 1000",
    "trainer.limit_train_batches": "None 1.0",
    "trainer.overfit_batches": "0 0.0",
    "trainer.fast_dev_run": "False",
    "exp_manager.ema.enable": "False",
    "exp_manager.create_early_stopping_callback": "False",
    "model.name": "megatron_gpt_full_te_layer_autocast",
    "model.attention_type": "multihead",
    "model.transformer_block_type": "pre_ln",
    "model.headscale": "False",
    "model.normalize_attention_scores": "True",
    "model.openai_gelu": "False",
    "model.fp32_residual_connection": "False",
    "model.apply_embedding_scaling": "False",
    "model.apply_residual_connection_post_layernorm": "False",
    "model.add_position_embedding": "True",
    "model.multi_query_attention": "False",
    "model.rotary_interleaved": "False",
    "model.pre_process": "True",
    "model.post_process": "True",
    "model.ffn_dropout": "0 0.0",
    "model.do_layer_norm_weight_decay": "False",
    "model.fp16_lm_cross_entropy": "False",
    "model.fp8": "False",
    "model.fsdp": "False",
    "model.deteministic_mode": "False",
    "model.moe_expert_capacity_factor": "None",
    "model.moe_pad_expert_input_to_capacity": "False",
    "model.moe_input_jitter_eps": "None",
    "model.moe_token_dropping": "False",
    "model.mcore_customization_config.new_decoder_architecture": "False",
    "model.mcore_customization_config.parallel_attention": "False",
    "model.data.data_impl": "mmap",
    "model.data.dataloader_type": "single",
    "model.data.shuffle_documents": "True",
    "model.data.no_seqlen_plus_one_input_tokens": "False",
    "model.data.pad_samples_to_global_batch_size": "False",
    "model.data.validation_drop_last": "True",
    "model.data.legacy_dataset": "False",
    "model.data.mock_dataset": "False",
    "model.data.add_fim": "False",
    "model.optim.dtype": "torch.float32 float32 fp32",
    "model.optim.adam_w_mode": "True",
    "model.optim.amsgrad": "False",
    "model.optim.bias_correction": "True",
}
MEGATRON_AS_HERE: Mapping[str, str] = {
    "optimizer": "adam",
    "weight-decay-incr-style": "constant",
    "lr-warmup-init": "0 0.0",
    "dataloader-type": "single",
    "softmax-type": "vanilla",
    "rope-type": "rope",
    "attention-backend": "auto fused flash unfused local",
    "ckpt-format": "torch_dist",
    "transformer-impl": "transformer_engine local",
    "fp8-margin": "0",
    "fp8-interval": "1",
    "main-grads-dtype": "fp32",
    "main-params-dtype": "fp32",
    "exp-avg-dtype": "fp32",
    "exp-avg-sq-dtype": "fp32",
    "num-distributed-optimizer-instances": "1",
    "mtp-num-layers": "0",
    "vocab-extra-ids": "0",
    "hybrid-attention-ratio": "0 0.0",
    "hybrid-mlp-ratio": "0 0.0",
    "moe-token-drop-policy": "probs",
}

# Keys of a model_config.yaml of NeMo that concern its training: what its weights compute does not follow from them.
NEMO_TRAINING_ONLY = frozenset(
    f"model.{name}"
    for name in (
        "fp8", "fsdp", "deteministic_mode", "do_layer_norm_weight_decay", "fp16_lm_cross_entropy", "ffn_dropout",
        "moe_input_jitter_eps", "moe_pad_expert_input_to_capacity",
    )
)  # fmt: skip

# Keys that need no counterpart, by the reason; ``section.*`` stands for all keys of a section.
NEMO_LEFT: Mapping[str, str] = {
    "Hydra's own": "defaults hydra.*",
    "the scheduler's: see slurm/": "run.*",
    "a label": "name",
    "set them in the environment": "env_vars.*",
    "checkpoints go to a file system": "s3_checkpointing.*",
    "checkpoint.init_from, run.dir or checkpoint.resume say it": "restore_from_path model.restore_from_path "
    "model.resume_from_checkpoint exp_manager.resume_from_checkpoint",
    "folders, loggers and checkpoints have keys of their own here (run.dir, exp_manager.*, checkpoint.*)": ""
    "exp_manager.explicit_log_dir exp_manager.exp_dir exp_manager.name exp_manager.version "
    "exp_manager.use_datetime_version "
    "exp_manager.create_checkpoint_callback exp_manager.checkpoint_callback_params.* exp_manager.wandb_logger_kwargs.* "
    "exp_manager.create_tensorboard_logger exp_manager.create_neptune_logger exp_manager.neptune_logger_kwargs.* "
    "exp_manager.resume_if_exists exp_manager.resume_ignore_no_checkpoint exp_manager.log_step_timing "
    "exp_manager.step_timing_kwargs.* exp_manager.log_global_rank_0_only exp_manager.seconds_to_sleep "
    "model.dist_ckpt_format model.dist_ckpt_load_on_device model.dist_ckpt_parallel_save",
    "Lightning's own, which is not used": "trainer.accelerator trainer.logger trainer.enable_checkpointing "
    "trainer.use_distributed_sampler trainer.replace_sampler_ddp trainer.benchmark trainer.enable_progress_bar "
    "trainer.enable_model_summary trainer.num_sanity_val_steps trainer.limit_test_batches trainer.strategy "
    "trainer.check_val_every_n_epoch",
    "read beside model.fp8 alone": "model.fp8_e4m3 model.fp8_hybrid model.fp8_margin model.fp8_interval "
    "model.fp8_amax_history_len model.fp8_amax_compute_algo model.fp8_wgrad model.fp8_params model.reduce_amax",
    "Transformer Engine's overlap of communication is not offered": "model.ub_tp_comm_overlap "
    "model.ub_tp_comm_overlap_cfg model.ub_tp_comm_overlap_cfg.* model.tp_comm_overlap_ag model.tp_comm_overlap_rs",
    "profile with nsys around the command": "model.nsys_profile.* model.enable_megatron_timers "
    "model.megatron_timer_kwargs.* model.memory_profile.*",
    "read beside model.fsdp alone": "model.fsdp_grad_reduce_dtype model.fsdp_sharded_checkpoint "
    "model.fsdp_sharding_strategy model.fsdp_use_orig_params",
    "choose it with tokenizer=NAME or data.tokenizer.*: files must be named anew": "model.tokenizer.*",
    "data.seq_length says it": "model.encoder_seq_length",
    "trainer.precision says it": "model.precision",
    "says what made the file": "model.target model.nemo_version",
    "how data is fetched: data.prefetch and data.cache_dir": "model.data.num_workers model.data.index_mapping_dir "
    "model.data.skip_warmup model.data.delay_data_init model.data.delay_data_mmap model.data.mmap_bin_files "
    "model.data.exchange_indices_distributed",
    "read beside model.data.add_fim alone": "model.data.fim.*",
    "changes nothing but rounding": "model.apply_query_key_layer_scaling model.attention_softmax_in_fp32 "
    "model.masked_softmax_fusion model.bias_dropout_add_fusion model.cross_entropy_loss_fusion model.apply_rope_fusion "
    "model.persist_layer_norm model.use_flash_attention model.gradient_accumulation_fusion model.grad_div_ar_fusion "
    "model.transformer_engine model.mcore_gpt model.megatron_amp_O2 model.onnx_safe model.use_emha "
    "model.get_attention_mask_from_fusion",
    "speed and memory alone": "model.apex_transformer_log_level model.batch_p2p_comm model.overlap_p2p_comm "
    "model.sync_batch_comm model.cpu_offloading model.cpu_offloading_activations model.cpu_offloading_num_layers "
    "model.cpu_offloading_weights model.defer_embedding_wgrad_compute model.wgrad_deferral_limit model.gc_interval "
    "model.enable_cuda_graph model.grad_allreduce_chunk_size_mb model.gradient_as_bucket_view model.sharp "
    "model.nccl_communicator_config_path model.use_cpu_initialization model.use_te_rng_tracker "
    "model.use_tp_pp_dp_mapping model.validation_param_sync_overlap model.activations_checkpoint_layers_per_pipeline "
    "model.num_micro_batches_with_partial_activation_checkpoints model.optim.bucket_cap_mb "
    "model.optim.contiguous_grad_buffer model.optim.contiguous_param_buffer model.optim.lock_timeout "
    "model.optim.nccl_ub model.optim.overlap_grad_sync_dtype",
}
MEGATRON_LEFT: Mapping[str, str] = {
    "choose it with tokenizer=NAME or data.tokenizer.*: files must be named anew": "tokenizer-type tokenizer-model "
    "tokenizer-metadata vocab-file merge-file tiktoken-pattern tiktoken-num-special-tokens tiktoken-special-tokens "
    "legacy-tokenizer trust-remote-code",
    "the launcher's": "master-addr master-port node-rank local-rank rdzv-id rdzv-backend rdzv-endpoint rdzv-conf "
    "max-restarts standalone tee redirects log-dir role run-path monitor-interval",
    "run.dir, checkpoint.init_from and checkpoint.resume say it": "save load pretrained-checkpoint ckpt-step finetune "
    "no-load-optim no-load-rng no-save-optim no-save-rng use-checkpoint-args use-mp-args-from-checkpoint-args "
    "no-use-tokenizer-model-from-checkpoint-args exit-on-missing-checkpoint override-opt-param-scheduler "
    "use-checkpoint-opt-param-scheduler load-main-params-from-ckpt auto-detect-ckpt-format "
    "non-persistent-save-interval non-persistent-ckpt-type non-persistent-global-ckpt-dir "
    "non-persistent-local-ckpt-dir save-retain-interval use-dist-ckpt dist-ckpt-format dist-ckpt-strictness "
    "ckpt-fully-parallel-save no-ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure "
    "use-persistent-ckpt-worker dist-ckpt-optim-fully-reshardable no-initialization",
    "loggers have keys of their own (exp_manager.*); metrics.jsonl has the rest": "tensorboard-dir "
    "tensorboard-log-interval tensorboard-queue-size wandb-project wandb-entity wandb-exp-name wandb-save-dir "
    "log-params-norm log-num-zeros-in-grad log-throughput log-progress log-energy log-timers-to-tensorboard "
    "log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-world-size-to-tensorboard "
    "no-log-loss-scale-to-tensorboard timing-log-level timing-log-option logging-level "
    "log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard no-barrier-with-level-1-timing log-straggler "
    "moe-per-layer-logging",
    "profile with nsys around the command": "profile profile-step-start profile-step-end profile-ranks "
    "use-pytorch-profiler record-memory-history memory-snapshot-path",
    "always so": "use-mcore-models calculate-per-token-loss exit-signal-handler no-create-attention-mask-in-dataloader "
    "no-mmap-bin-files",
    "position-embedding-type says it": "no-position-embedding",
    "data.prefetch and data.cache_dir": "num-workers data-cache-path num-dataset-builder-threads",
    "choose data=mock": "mock-data",
    "performance.* has keys of its own": "cross-entropy-loss-fusion cross-entropy-fusion-impl "
    "no-gradient-accumulation-fusion optimizer-cpu-offload optimizer-offload-fraction ddp-bucket-size ddp-num-buckets",
    "changes nothing but rounding": "attention-softmax-in-fp32 apply-query-key-layer-scaling use-flash-attn "
    "no-masked-softmax-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm "
    "no-check-for-nan-in-loss-and-grad check-for-nan-in-loss-and-grad rerun-mode disable-bf16-reduced-precision-matmul "
    "moe-router-fusion no-fp8-wgrad moe-router-padding-for-fp8",
    "speed and memory alone": "tp-comm-overlap tp-comm-overlap-cfg tp-comm-bootstrap-backend distributed-backend "
    "disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs tp-comm-overlap-rs-dgrad disable-tp-comm-bulk-dgrad "
    "disable-tp-comm-bulk-wgrad disable-tp-comm-split-ag disable-tp-comm-split-rs no-overlap-p2p-communication "
    "overlap-p2p-communication-warmup-flush microbatch-group-size-per-virtual-pipeline-stage manual-gc "
    "manual-gc-interval no-manual-gc-eval empty-unused-memory-level no-align-grad-reduce no-align-param-gather "
    "no-async-tensor-model-parallel-allreduce no-scatter-gather-tensors-in-pipeline distribute-saved-activations "
    "ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw defer-embedding-wgrad-compute wgrad-deferral-limit "
    "overlap-param-gather-with-optimizer-step no-clone-scatter-output-in-embedding disable-gloo-process-groups "
    "use-nccl-ub use-sharp nccl-communicator-config-path use-tp-pp-dp-mapping high-priority-stream-groups "
    "pipeline-model-parallel-comm-backend moe-permute-fusion moe-shared-expert-overlap moe-layer-recompute "
    "overlap-moe-expert-parallel-comm delay-wgrad-compute moe-enable-deepep moe-deepep-num-sms use-cpu-initialization "
    "te-rng-tracker init-model-with-meta-device distributed-timeout-seconds-after-init use-fused-weighted-squared-relu "
    "no-gradient-reduce-div-fusion train-sync-interval use-te-activation-func",
}
