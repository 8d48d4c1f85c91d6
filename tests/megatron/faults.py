"""What is wrong or missing in Megatron-Core, shown on its own code in a process that none of our patches has touched.

``python -m tests.megatron.faults`` prints one JSON object: by patch (megatron/patches.toml) true where its reason still
holds, false where the patch can go, and the error of a check that ran into one.
"""

import dataclasses
import inspect
import json
import tempfile
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

NO_TE = find_spec("transformer_engine") is None
FAULTS: dict[str, Callable[[], bool]] = {}


def fault(check: Callable[[], bool]) -> Callable[[], bool]:
    FAULTS[check.__name__] = check
    return check


def _raises(
    kinds: type[BaseException] | tuple[type[BaseException], ...], call: Callable[..., Any], *inputs: Any
) -> bool:
    try:
        call(*inputs)
    except kinds:
        return True
    return False


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _config(**fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "perform_initialization": False}
    return TransformerConfig(**{**sizes, **fields})


def _linear(config: Any, **settings: Any) -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    return ColumnParallelLinear(
        8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=True,
        tp_group=dist.group.WORLD, **settings,
    )  # fmt: skip


class _Calls(TorchDispatchMode):
    """Counts calls of one of PyTorch's operations."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.count = operation, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket is self.operation
        return function(*args, **(kwargs or {}))


@fault
def cuda_on_cpu() -> bool:
    """Its generators are those of CUDA; runs before the mapping is installed."""
    from megatron.core.tensor_parallel import random

    return torch.cuda.is_available() or _raises((RuntimeError, AssertionError), random._get_cuda_rng_state)


@fault
def router_product() -> bool:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    return not NO_TE or _raises(
        NameError, router_gating_linear, torch.ones(1, 2), torch.ones(3, 2), None, torch.float32
    )


@fault
def latent_attention_flag() -> bool:
    from megatron.core.transformer import multi_latent_attention

    return not NO_TE or multi_latent_attention.HAVE_TE


@fault
def norm_recomputation() -> bool:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    return not NO_TE or _raises(NameError, CheckpointWithoutOutput().checkpoint, torch.neg, torch.ones(2))


@fault
def gradient_accumulation() -> bool:
    if find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return True
    return _raises(RuntimeError, _linear, _config(gradient_accumulation_fusion=True))


@fault
def fused_rope() -> bool:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    config = _config()
    config.apply_rope_fusion = True
    x, angles = torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4)
    with_group = {"cp_group": dist.group.WORLD}
    return not NO_TE or _raises(AssertionError, lambda: apply_rotary_pos_emb(x, angles, config, **with_group))


@fault
def fused_qkv() -> bool:
    from megatron.core.transformer import attention

    return not NO_TE or not attention.HAVE_FUSED_QKV_ROPE


@fault
def fused_swiglu() -> bool:
    """The function is a name of the module: neither a field nor an argument."""
    from megatron.core.transformer import mlp

    return "bias_swiglu_impl" in mlp.MLP.forward.__code__.co_names


@fault
def module_classes() -> bool:
    from megatron.core.models.gpt import GPTModel

    return {"ColumnParallelLinear", "LanguageModelEmbedding"} <= set(GPTModel.__init__.__code__.co_names)


@fault
def model_steps() -> bool:
    from megatron.core.models.gpt import GPTModel

    return "output_processor" not in _parameters(GPTModel.forward)


@fault
def router() -> bool:
    """No loss mask reaches it: nothing tells it how many tokens are learned."""
    from megatron.core.transformer.moe.router import TopKRouter

    methods = [value for value in vars(TopKRouter).values() if inspect.isfunction(value)]
    return not any("loss_mask" in _parameters(method) for method in methods)


@fault
def local_dispatcher() -> bool:
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    return not any("dispatcher" in field.name for field in dataclasses.fields(MoESubmodules))


@fault
def expert_marks() -> bool:
    """With EP1 and an expert tensor parallel size other than TP, an expert is summed with dense weights."""
    config = _config(tensor_model_parallel_size=2, expert_tensor_parallel_size=1, num_moe_experts=2)
    return _linear(config, is_expert=True).weight.allreduce


@fault
def fused_layer() -> bool:
    return "fused_residual_rmsnorm" not in {field.name for field in dataclasses.fields(_config())}


@fault
def parallel_residual() -> bool:
    return not any("parallel" in f.name and "residual" in f.name for f in dataclasses.fields(_config()))


@fault
def weight_gradients() -> bool:
    """Both hand a whole gradient to autograd and leave the fp32 buffer alone."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    embedding = VocabParallelEmbedding(
        8, 8, init_method=torch.nn.init.zeros_, config=_config(), tp_group=dist.group.WORLD
    )
    found = []
    for module, inputs in ((embedding, torch.tensor([[1]])), (_linear(_config()), torch.ones(1, 1, 8))):
        module.weight.data.zero_()
        module.weight.main_grad = torch.zeros_like(module.weight)
        output = module(inputs.to(module.weight.device))
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        found.append(module.weight.grad.count_nonzero() > 0 and not module.weight.main_grad.count_nonzero())
    return all(found)


@fault
def stale_gradients() -> bool:
    from megatron.core.distributed import DistributedDataParallel

    return _parameters(DistributedDataParallel.zero_grad_buffer) == {"self"}


@fault
def router_walk() -> bool:
    from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors

    class Walked(torch.nn.Module):
        walks = 0

        def modules(self) -> Any:
            Walked.walks += 1
            return super().modules()

    reset_model_temporary_tensors(_config(), [Walked()])
    return Walked.walks > 0


@fault
def gradient_norm() -> bool:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm:
        return True  # a kernel of others stands there, and ours is not used
    large = torch.full((1 << 26,), 0.1)
    norm, _ = clip_grads.l2_norm_impl(0, None, [[large]], False)
    exact = large.double().square().sum().sqrt()
    return abs(float(norm) / float(exact) - 1.0) > 1e-6


@fault
def copied_weights() -> bool:
    from megatron.core.optimizer.optimizer import _multi_tensor_copy_this_to_that

    with _Calls(torch.ops.aten.copy_) as copies:
        _multi_tensor_copy_this_to_that([torch.ones(2)] * 3, [torch.zeros(2) for _ in range(3)])
    return copies.count == 3


@fault
def optimizer_class() -> bool:
    from megatron.core.optimizer import get_megatron_optimizer

    return not any("class" in name or "cls" in name for name in _parameters(get_megatron_optimizer))


@fault
def expert_norm() -> bool:
    """One group decides for experts and for dense weights."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    return _parameters(param_is_not_tensor_parallel_duplicate) == {"param", "tp_group"}


@fault
def counted_gradients() -> bool:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    class Watched(torch.nn.Parameter):
        asked = 0

        @property
        def shared(self) -> bool:
            Watched.asked += 1
            return False

    parameter = Watched(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = FP32Optimizer(torch.optim.SGD([parameter], 0.1), OptimizerConfig(), lambda *_: None)
    optimizer.tp_group = dist.group.WORLD
    optimizer.get_main_grads_for_grad_norm()
    once = Watched.asked
    optimizer.get_main_grads_for_grad_norm()
    return 0 < once < Watched.asked


@fault
def optimizer_step() -> bool:
    from megatron.core.optimizer import ChainedOptimizer

    return _parameters(ChainedOptimizer.step) == {"self"}


@fault
def optimizer_state() -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    formats = DistributedOptimizer.checkpoint_fully_reshardable_formats
    return formats == {"fully_reshardable", "fully_sharded_model_space", "fsdp_dtensor"}


@fault
def checkpoint_reader() -> bool:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    takers = (dist_checkpointing.load, TorchDistLoadShardedStrategy.__init__, TorchDistLoadShardedStrategy.load)
    return not any("reader" in name for taker in takers for name in _parameters(taker))


@fault
def checkpoint_plan() -> bool:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    steps = [getattr(FileSystemWriterAsync, name) for name in vars(FileSystemWriterAsync)]
    codes = [inspect.unwrap(step).__code__ for step in steps if inspect.isfunction(step)]
    return any("Process" in code.co_names for code in codes)


def _answer(check: Callable[[], bool]) -> bool | str:
    try:
        return bool(check())
    except Exception:
        return traceback.format_exc()


def main() -> None:
    found = {"cuda_on_cpu": _answer(cuda_on_cpu)}
    from nemo_llm.megatron import cuda_on_cpu as mapping

    if not torch.cuda.is_available():
        mapping.install()
    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
    for name, check in FAULTS.items():
        if name not in found:
            found[name] = _answer(check)
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
