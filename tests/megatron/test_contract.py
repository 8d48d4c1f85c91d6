"""The names of megatron-core that this project replaces or calls though they are private: a change there fails here."""

import importlib
import inspect

import pytest

from tests.ranks import RankPool


def _names_are_there() -> None:
    """Runs in a rank, where Megatron is imported already."""
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear, layers
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import attention, mlp
    from megatron.core.transformer.moe import moe_layer, moe_utils, router
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    from nemo_llm.megatron.models import define_missing_names

    assert callable(megatron_random._get_cuda_rng_state)
    assert callable(megatron_random._set_cuda_rng_state)
    assert hasattr(layers, "_grad_accum_fusion_available")
    assert hasattr(rope_utils, "fused_apply_rotary_pos_emb")
    assert hasattr(attention, "HAVE_FUSED_QKV_ROPE")
    assert "apply_fused_qkv_rotary_pos_emb(" in inspect.getsource(attention.Attention.forward)
    assert list(inspect.signature(mlp.bias_swiglu_impl).parameters)[:2] == ["input", "bias"]
    define_missing_names()
    assert hasattr(moe_utils, "te_general_gemm")
    assert hasattr(clip_grads, "l2_norm_impl")
    for mixed in (optimizer.Float16OptimizerWithFloat16Params, distrib_optimizer.DistributedOptimizer):
        assert issubclass(mixed, optimizer.MixedPrecisionOptimizer)
        assert "self._copy_model_grads_to_main_grads()" in inspect.getsource(mixed.prepare_grads)
        assert "self._copy_main_params_to_model_params()" in inspect.getsource(mixed.__mro__[1].step_with_ready_grads)
        assert "self.get_main_grads_for_grad_norm()" in inspect.getsource(mixed.get_grad_norm)
        assert list(inspect.signature(mixed.zero_grad).parameters) == ["self", "set_to_none"]
    for name in ("Adam", "USING_PYTORCH_OPTIMIZER"):
        assert hasattr(megatron_optimizer, name)
    assert hasattr(distrib_optimizer, "Adam")
    finalize = inspect.getsource(importlib.import_module("megatron.core.distributed.finalize_model_grads"))
    resets = finalize.partition("def reset_model_temporary_tensors")[2].partition("\n\n\n")[0]
    assert (resets.count(" if "), "expert_bias" in resets, "global_aux_loss" in resets) == (2, True, True)
    parameters = inspect.signature(GPTModel._postprocess).parameters
    assert list(parameters)[1] == "hidden_states"
    assert {"labels", "loss_mask"} <= set(parameters)
    parameters = list(inspect.signature(GPTModel._preprocess).parameters)
    assert parameters[1:3] == ["input_ids", "position_ids"]
    assert "padding_mask,\n        ) = preproc_output[:6]" in inspect.getsource(GPTModel.forward)
    for call in ("self.apply_z_loss(", "self.is_aux_loss_enabled()", "self._apply_expert_bias("):
        assert call in inspect.getsource(router.TopKRouter.routing)
    assert "self.local_tokens_per_expert += " in inspect.getsource(router.TopKRouter)
    assert "self.router)(hidden_states, padding_mask)" in inspect.getsource(moe_layer.MoELayer.route)
    assert "padding_mask.transpose(0, 1).bool()" in inspect.getsource(moe_layer.MoELayer.forward)
    assert "weight" in inspect.signature(ColumnParallelLinear.forward).parameters
    assert "hidden_states" in inspect.signature(TransformerLayer._forward_attention).parameters
    assert list(inspect.signature(_StorageInfo).parameters)[:3] == ["relative_path", "offset", "length"]


def test_private_names_of_megatron_are_there(ranks: RankPool) -> None:
    ranks.run(_names_are_there, 1)


def _timeouts(minutes: float) -> None:
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime

    cfg = compose(["+model=gpt_tiny", "trainer.accelerator=cpu", "parallelism.tensor_model_parallel_size=2"])
    start_runtime(cfg.runtime_setting).shorten_timeouts(minutes)


def test_timeouts_of_living_groups_can_be_shortened(ranks: RankPool) -> None:
    ranks.run(_timeouts, 2, 3.0)


def _refuses_where_cuda_is_present() -> str:
    import torch

    from nemo_llm.megatron import cuda_on_cpu

    seen, installed = torch.cuda.is_available, cuda_on_cpu.is_installed
    torch.cuda.is_available, torch.cuda.get_device_name = (lambda: True), (lambda index: "a real GPU")
    cuda_on_cpu.is_installed = lambda: False
    try:
        cuda_on_cpu.install()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.is_available, cuda_on_cpu.is_installed = seen, installed
    return "installed"


def test_cpu_mapping_refuses_to_hide_a_gpu(ranks: RankPool) -> None:
    assert "a real GPU" in ranks.run(_refuses_where_cuda_is_present, 1)[0]


def _mapped_calls() -> None:
    import torch

    x = torch.ones(3, device="cuda")
    assert x.device.type == "cpu"
    assert x.cuda() is x
    assert x.type() == "torch.cuda.FloatTensor"
    assert torch.empty(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
    torch.cuda.Stream().wait_stream(torch.cuda.current_stream())


def test_device_arguments_are_mapped(ranks: RankPool) -> None:
    ranks.run(_mapped_calls, 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_uneven_gather_and_reduce_scatter_over_gloo(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(_uneven_collectives, world_size) == [True] * world_size


def _uneven_collectives() -> bool:
    import torch
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [torch.empty(r + 1) for r in range(world)]
    dist.all_gather(parts, torch.full((rank + 1,), float(rank)))
    gathered = all(torch.equal(part, torch.full((r + 1,), float(r))) for r, part in enumerate(parts))
    output = torch.empty(rank + 1)
    dist.reduce_scatter(output, [torch.full((r + 1,), 1.0 + rank) for r in range(world)])
    return gathered and torch.equal(output, torch.full((rank + 1,), sum(1.0 + r for r in range(world))))


def test_names_that_checkpoints_use() -> None:
    """Private names of megatron-core 0.16.1 and torch that nemo_llm/checkpoint leans on."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.distributed.checkpoint import filesystem

    for name in ("_replace_state_dict_keys_with_sharded_keys", "mcore_to_pyt_state_dict", "MCoreSavePlanner"):
        assert hasattr(torch_dist, name), name
    for name in ("_StorageInfo", "_StoragePrefix"):
        assert hasattr(filesystem, name), name
    assert hasattr(dist.distributed_c10d, "_get_default_store")
    assert hasattr(DistributedOptimizer, "_get_model_param_range_map")


def _calls_of_apex() -> list[str]:
    import re

    from megatron.core.tensor_parallel import layers

    source = inspect.getsource(layers.LinearWithGradAccumulationAndAsyncCommunication.backward)
    return re.findall(r"fused_weight_gradient_mlp_cuda\.(\w+)\(\s*([\w., ]+?)\s*\)", source)


def test_megatron_calls_apexs_kernel_as_ours_can_be_called(ranks: RankPool) -> None:
    """apex's extension, taken where NVIDIA's image has it, and `add_weight_gradient` in its place elsewhere."""
    calls = ranks.run(_calls_of_apex, 1)[0]
    assert {name for name, _ in calls} == {"wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"}
    assert {arguments for _, arguments in calls} == {"total_input, grad_output, weight.main_grad"}


def test_apexs_own_kernel_is_left_where_megatron_found_it(ranks: RankPool) -> None:
    ranks.run(_apex_is_left_alone, 1)


def _apex_is_left_alone() -> None:
    from megatron.core.tensor_parallel import layers

    from nemo_llm.megatron.models import offer_gradient_accumulation
    from nemo_llm.models.layers.main_grad import accumulate

    names = ("_grad_accum_fusion_available", "fused_weight_gradient_mlp_cuda")
    before = {name: getattr(layers, name, None) for name in names}
    found = object()
    try:
        layers._grad_accum_fusion_available, layers.fused_weight_gradient_mlp_cuda = True, found
        offer_gradient_accumulation(accumulate)
        assert layers.fused_weight_gradient_mlp_cuda is found
        layers._grad_accum_fusion_available = False
        offer_gradient_accumulation(accumulate)
        ours = layers.fused_weight_gradient_mlp_cuda
        for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
            assert len(inspect.signature(getattr(ours, name)).parameters) == 3
    finally:
        for name, value in before.items():
            setattr(layers, name, value)
