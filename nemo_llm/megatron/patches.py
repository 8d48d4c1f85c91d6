"""Every touch of Megatron-Core's insides, each with the versions that need it and what removes it.

``python -m nemo_llm.megatron.patches`` prints them. docs/develop/upgrade-megatron.md says what 0.19 does in each place;
tests/megatron/ holds the text of all that is relied on and shows each fault on Megatron's own code.
"""

from dataclasses import dataclass

READ = ("0.16", "0.17", "0.18", "0.19")
"""Minor versions whose source was read for `Patch.versions`; installed is the first."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One thing that is replaced in Megatron-Core, written anew after it, or used though it is private.

    Attributes:
        where: our ``module:name`` that does it.
        versions: minor versions, of those in `READ`, that need it.
        reason: what Megatron does, or does not offer.
        effect: what is done instead.
        drop: when it can go, and how.
        relies_on: what it replaces, copies or calls: ``module:name`` below ``megatron.core``.
    """

    name: str
    where: str
    versions: tuple[str, ...]
    reason: str
    effect: str
    drop: str
    relies_on: tuple[str, ...]


PATCHES = (
    Patch(
        name="cuda_on_cpu",
        where="nemo_llm.megatron.cuda_on_cpu:install",
        versions=READ,
        reason="Some 800 lines name the CUDA device, and its tracker of generators has no hook for another one.",
        effect="Without a GPU, PyTorch's few doors to CUDA and two helpers of the tracker answer with the CPU.",
        drop="When a model trains on a CPU without it: delete the module and its call in parallel/runtime.py.",
        relies_on=("tensor_parallel.random:_get_cuda_rng_state", "tensor_parallel.random:_set_cuda_rng_state"),
    ),
    Patch(
        name="router_product",
        where="nemo_llm.megatron.models:define_missing_names",
        versions=("0.16",),
        reason="te_general_gemm is imported from Transformer Engine alone, then read by the router on every machine.",
        effect="The name is None where Transformer Engine is missing, which the router takes for PyTorch's product.",
        drop="With 0.16: delete the two lines.",
        relies_on=("transformer.moe.moe_utils:RouterGatingLinearFunction",),
    ),
    Patch(
        name="latent_attention_flag",
        where="nemo_llm.megatron.models:define_missing_names",
        versions=("0.16",),
        reason="HAVE_TE is True wherever Megatron's wrapper can be imported, whose classes are mocks without the real "
        "library: nothing can be an instance of them.",
        effect="The flag says what is installed.",
        drop="With 0.16: delete the two lines, and the function with them.",
        relies_on=("transformer.multi_latent_attention:MultiLatentAttention.__init__",),
    ),
    Patch(
        name="norm_recomputation",
        where="nemo_llm.megatron.models:offer_norm_recomputation",
        versions=READ,
        reason="The checkpoint of a norm is made with fp8=False, which the constructor takes for FP8 (it asks whether "
        "it is None): the forward pass ends in a NameError without Transformer Engine.",
        effect="The default is None, which means no FP8.",
        drop="When the constructor asks for the value: delete the function and its call in transformer_config.",
        relies_on=("tensor_parallel.random:CheckpointWithoutOutput.__init__",),
    ),
    Patch(
        name="gradient_accumulation",
        where="nemo_llm.megatron.models:offer_gradient_accumulation",
        versions=READ,
        reason="gradient_accumulation_fusion wants apex's extension by two names of the module and takes no other.",
        effect="Weight gradients are added to the fp32 buffer by our product where apex is missing.",
        drop="When the layer takes a function, or no run uses Megatron's own linear layers.",
        relies_on=(
            "tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward",
            "tensor_parallel.layers:ColumnParallelLinear.__init__",
        ),
    ),
    Patch(
        name="fused_rope",
        where="nemo_llm.megatron.models:offer_fused_rope",
        versions=READ,
        reason="apply_rope_fusion wants Transformer Engine's kernel by a name of the module.",
        effect="Ours stands there where Transformer Engine is missing.",
        drop="When the configuration takes a function.",
        relies_on=("models.common.embeddings.rope_utils:apply_rotary_pos_emb",),
    ),
    Patch(
        name="fused_qkv",
        where="nemo_llm.megatron.models:offer_fused_qkv",
        versions=READ,
        reason="fused_single_qkv_rope wants Transformer Engine's kernel by two names of the module.",
        effect="Split and rotation of queries, keys and values are one kernel of ours.",
        drop="When the configuration takes a function.",
        relies_on=("transformer.attention:Attention.forward",),
    ),
    Patch(
        name="fused_swiglu",
        where="nemo_llm.megatron.models:offer_fused_swiglu",
        versions=READ,
        reason="bias_activation_fusion takes its function from a name of the module.",
        effect="SwiGLU is one kernel of ours each way on CUDA.",
        drop="When the configuration takes a function.",
        relies_on=("transformer.mlp:MLP.forward", "fusions.fused_bias_swiglu:bias_swiglu_impl"),
    ),
    Patch(
        name="module_classes",
        where="nemo_llm.megatron.models:become",
        versions=READ,
        reason="GPTModel lets nobody choose the class of its word embedding and output layer, nor of a layer that gets "
        "an adapter or 4-bit weights later.",
        effect="A module's class becomes a subclass of itself; its parameters and their names stay.",
        drop="When a specification names these classes; adapters keep it.",
        relies_on=("models.gpt.gpt_model:GPTModel.__init__",),
    ),
    Patch(
        name="model_steps",
        where="nemo_llm.models.language_model:LanguageModel",
        versions=READ,
        reason="GPTModel has no public step between its layers and its losses, nor before its layers; its sharded "
        "state asks every chunk that ends a model for an output layer.",
        effect="_preprocess hands the routers' facts on and picks angles while decoding; _postprocess fuses projection "
        "and loss; post_process is False while a chunk with a head is described.",
        drop="0.18 takes an output_processor, which can stand for _postprocess; _preprocess has no public form yet.",
        relies_on=(
            "models.gpt.gpt_model:GPTModel.forward",
            "models.gpt.gpt_model:GPTModel._preprocess",
            "models.gpt.gpt_model:GPTModel._postprocess",
            "models.gpt.gpt_model:GPTModel.sharded_state_dict",
        ),
    ),
    Patch(
        name="latent_projection",
        where="nemo_llm.models.layers.latent_attention:LatentAttention",
        versions=READ,
        reason="Under tensor parallelism without Transformer Engine the gradient of the keys' rotated part lacks the "
        "heads of other ranks; the rotary embedding knows no positions of its own for each row.",
        effect="The projection's class sums that gradient; the embedding's forward picks angles while decoding.",
        drop="When tests/models/test_latent_attention.py passes under TP without `_LatentProjection`.",
        relies_on=(
            "transformer.multi_latent_attention:MLASelfAttention.get_query_key_value_tensors",
            "tensor_parallel.mappings:copy_to_tensor_model_parallel_region",
        ),
    ),
    Patch(
        name="router",
        where="nemo_llm.models.layers.router:Router",
        versions=READ,
        reason="Losses of a router are multiplied by the positions of one rank, whatever the loss mask, and the expert "
        "bias counts padding.",
        effect="apply_z_loss, is_aux_loss_enabled and _apply_expert_bias do nothing; `routing` adds our own losses.",
        drop="When Megatron weighs them by the learned tokens of a micro-batch.",
        relies_on=("transformer.moe.router:TopKRouter", "transformer.moe.moe_layer:MoELayer.forward"),
    ),
    Patch(
        name="local_dispatcher",
        where="nemo_llm.models.layers.experts:use_local_dispatcher",
        versions=READ,
        reason="A layer of experts builds one of three dispatchers, which all copy tokens, and takes no fourth.",
        effect="token_dispatcher of a built layer is replaced where one rank holds every expert, whole.",
        drop="When the specification of the layer names its dispatcher.",
        relies_on=(
            "transformer.moe.moe_layer:MoELayer",
            "transformer.moe.token_dispatcher:MoETokenDispatcher",
            "transformer.moe.experts:SequentialMLP",
        ),
    ),
    Patch(
        name="expert_marks",
        where="nemo_llm.models.build:_mark_experts",
        versions=("0.16", "0.17", "0.18"),
        reason="Experts are marked (allreduce=False) where EP is above 1; with EP1 and an expert tensor parallel size "
        "other than TP their copies train apart.",
        effect="The mark is set wherever experts have groups of their own.",
        drop="With 0.18: delete the function and its call.",
        relies_on=("tensor_parallel.layers:ColumnParallelLinear.__init__",),
    ),
    Patch(
        name="fused_layer",
        where="nemo_llm.models.layers.fused_residual_layer:FusedLayer",
        versions=READ,
        reason="The layer adds its residual after each half in a kernel of its own.",
        effect="`forward` is written anew, with norms that take the residual along; other cases run Megatron's.",
        drop="When Megatron's fused_residual_rmsnorm (0.17) runs without Transformer Engine.",
        relies_on=(
            "transformer.transformer_layer:TransformerLayer.forward",
            "transformer.transformer_layer:TransformerLayer._forward_attention",
            "transformer.transformer_layer:TransformerLayer._forward_mlp",
        ),
    ),
    Patch(
        name="parallel_residual",
        where="nemo_llm.models.layers.norm_variants:ParallelResidualLayer",
        versions=READ,
        reason="No layer lets attention and MLP read the same input (GPT-J, GPT-NeoX).",
        effect="`forward` calls the private _forward_attention, then the MLP on the layer's input.",
        drop="When TransformerConfig has a parallel residual.",
        relies_on=(
            "transformer.transformer_layer:TransformerLayer.forward",
            "transformer.transformer_layer:TransformerLayer._forward_attention",
        ),
    ),
    Patch(
        name="weight_gradients",
        where="nemo_llm.models.layers.main_grad:returned_gradient",
        versions=READ,
        reason="Linear layers and the word embedding hand a whole gradient to autograd, which is then added to the "
        "fp32 buffer: a copy in bf16 and a pass more.",
        effect="`forward` of both is written anew, adds to main_grad and sets grad_added_to_main_grad, as Megatron's "
        "fused layers do; zero_out_wgrad is taken back where both uses of a matrix add by themselves.",
        drop="When the embedding adds to main_grad too and apex is not needed for the linear layers.",
        relies_on=(
            "tensor_parallel.layers:ColumnParallelLinear.forward",
            "tensor_parallel.layers:RowParallelLinear.forward",
            "tensor_parallel.layers:VocabParallelEmbedding.forward",
            "distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
        ),
    ),
    Patch(
        name="stale_gradients",
        where="nemo_llm.megatron.optimizer:forget_gradients",
        versions=READ,
        reason="zero_grad_buffer writes zeros into every buffer before each step.",
        effect="Its steps anew: gradients that our products overwrite become stale, the rest is zeroed.",
        drop="When zero_grad_buffer can leave parameters out.",
        relies_on=("distributed.distributed_data_parallel:DistributedDataParallel.zero_grad_buffer",),
    ),
    Patch(
        name="router_walk",
        where="nemo_llm.megatron.optimizer:skip_empty_walk",
        versions=READ,
        reason="Every step walks through all modules for counts of routers, whatever the router: 14 ms with 128 "
        "experts a layer.",
        effect="The walk is left out where no router counts anything. 0.19 counts for quantile_balancing too.",
        drop="When Megatron asks first.",
        relies_on=("distributed.finalize_model_grads:reset_model_temporary_tensors",),
    ),
    Patch(
        name="gradient_norm",
        where="nemo_llm.megatron.optimizer:use_functions",
        versions=READ,
        reason="Without Transformer Engine and apex the norm is summed in fp32 on a CPU, off by 1e-5 for large tensors "
        "and differently for each layout; on CUDA it waits for the device once a tensor.",
        effect="Our norm stands at the name that clip_grads reads.",
        drop="When local_multi_tensor_l2_norm is exact and does not wait.",
        relies_on=("optimizer.clip_grads:get_grad_norm_fp32", "utils:local_multi_tensor_l2_norm"),
    ),
    Patch(
        name="copied_weights",
        where="nemo_llm.megatron.optimizer:use_functions",
        versions=READ,
        reason="Updated weights go into the model one tensor a launch: with hundreds of experts as long as a layer.",
        effect="One launch copies them all.",
        drop="When Megatron copies by lists.",
        relies_on=("optimizer.optimizer:_multi_tensor_copy_this_to_that",),
    ),
    Patch(
        name="optimizer_class",
        where="nemo_llm.megatron.optimizer:build_with",
        versions=READ,
        reason="The class is chosen by what is installed (Transformer Engine, apex, else PyTorch's AdamW) and is no "
        "argument.",
        effect="Three names hold our class while the optimizer is built. From 0.17 on it is given `capturable`.",
        drop="When the class is an argument.",
        relies_on=(
            "optimizer:get_megatron_optimizer",
            "optimizer:_get_megatron_optimizer_based_on_param_groups",
            "optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        ),
    ),
    Patch(
        name="expert_norm",
        where="nemo_llm.megatron.optimizer:count_copies_once",
        versions=("0.16", "0.17", "0.18"),
        reason="Every part of the optimizer is given TP's group, by which copies of experts are counted.",
        effect="The part with experts gets the group that holds them.",
        drop="With 0.18, whose successor has expert_tp_group: delete the function and its call.",
        relies_on=("tensor_parallel.layers:param_is_not_tensor_parallel_duplicate",),
    ),
    Patch(
        name="counted_gradients",
        where="nemo_llm.megatron.optimizer:take_gradients_from",
        versions=READ,
        reason="Every step asks each parameter whether it counts, while the GPU waits: 15 ms for 1,500 weights.",
        effect="A method of the built optimizer is replaced by one that asks once. In 0.19 it has another name.",
        drop="When Megatron remembers the answer.",
        relies_on=("optimizer.optimizer:MegatronOptimizer.get_main_grads_for_grad_norm",),
    ),
    Patch(
        name="optimizer_step",
        where="nemo_llm.megatron.optimizer:update_weights",
        versions=READ,
        reason="ChainedOptimizer.step clips and updates in one, with no look at the norm between, and passes over all "
        "gradients for each of the mean and the clipping.",
        effect="Its steps anew: a caller may refuse the norm, and mean and clipping are one factor.",
        drop="When `step` can be asked between norm and update.",
        relies_on=(
            "optimizer.optimizer:ChainedOptimizer.step",
            "optimizer.optimizer:ChainedOptimizer.prepare_grads",
            "optimizer.optimizer:ChainedOptimizer.get_grad_norm",
            "optimizer.optimizer:ChainedOptimizer.step_with_ready_grads",
            "optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        ),
    ),
    Patch(
        name="optimizer_state",
        where="nemo_llm.megatron.optimizer:owned_ranges",
        versions=READ,
        reason="The distributed optimizer describes its state either gathered over data-parallel ranks or tied to TP "
        "and PP, and says publicly of no parameter which range a rank owns.",
        effect="gbuf_ranges, _get_model_param_range_map, model_param_group_index_map and the lists of 16-bit and fp32 "
        "parameters are read.",
        drop="When a form without a layout needs no gathering.",
        relies_on=(
            "optimizer.distrib_optimizer:DistributedOptimizer._build_model_gbuf_range",
            "optimizer.distrib_optimizer:DistributedOptimizer._build_optimizer_group_ranges",
            "optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map",
            "optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        ),
    ),
    Patch(
        name="checkpoint_reader",
        where="nemo_llm.megatron.checkpoint:read_files_by",
        versions=READ,
        reason="Distributed checkpoints are read with plain pickle, and no argument names another reader.",
        effect="Every checkpoint of the process is opened by checkpoint/safe_load.py. 0.17 hands async_strategy over "
        "and takes no strategy for common.pt; 0.19 keeps what was in it among the tensors.",
        drop="When load takes a reader.",
        relies_on=(
            "dist_checkpointing.strategies.torch:_get_filesystem_reader",
            "dist_checkpointing.strategies.torch:TorchDistLoadShardedStrategy",
            "dist_checkpointing.strategies.common:TorchCommonLoadStrategy",
            "dist_checkpointing.serialization:load",
        ),
    ),
    Patch(
        name="checkpoint_plan",
        where="nemo_llm.megatron.checkpoint:with_keys_of_shards",
        versions=READ,
        reason="Megatron's writer starts processes, which outlive a killed rank and keep its pipes open.",
        effect="checkpoint/writer.py takes Megatron's plan by its private steps and writes from threads.",
        drop="When the plan is public or the writer needs no process.",
        relies_on=(
            "dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
            "dist_checkpointing.strategies.torch:_replace_state_dict_keys_with_sharded_keys",
            "dist_checkpointing.strategies.torch:mcore_to_pyt_state_dict",
            "dist_checkpointing.strategies.torch:MCoreSavePlanner",
            "dist_checkpointing.strategies.state_dict_saver:save_state_dict_async_plan",
            "dist_checkpointing.strategies.fully_parallel:FullyParallelSaveStrategyWrapper",
            "dist_checkpointing.serialization:save",
        ),
    ),
)


if __name__ == "__main__":
    for patch in PATCHES:
        print(f"{patch.name} (megatron-core {', '.join(patch.versions)}; {patch.where})")
        print(f"  why: {patch.reason}\n  effect: {patch.effect}\n  gone: {patch.drop}")
