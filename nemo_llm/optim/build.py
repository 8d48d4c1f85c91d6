"""Megatron's optimizer (plain or distributed) from our section, with our AdamW or Muon inside."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    clip_grads,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import local_multi_tensor_l2_norm

from nemo_llm.checkpoint.optimizer_state import optimizer_parts, updates_experts
from nemo_llm.config import RunConfig
from nemo_llm.models.transformer_config import DTYPES
from nemo_llm.optim.adamw import FusedAdamW
from nemo_llm.optim.muon import Muon
from nemo_llm.optim.muon_matrices import connect_muon
from nemo_llm.parallel.runtime import ParallelRuntime


def build_optimizer(
    cfg: RunConfig, model: list[DistributedDataParallel], runtime: ParallelRuntime
) -> MegatronOptimizer:
    """AdamW or Muon over these model chunks; norms and biases (one-dimensional parameters) get no weight decay."""
    dtype = cfg.precision.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=cfg.optim.lr,
        min_lr=cfg.optim.sched.min_lr,
        weight_decay=cfg.optim.weight_decay,
        adam_beta1=cfg.optim.adam_beta1,
        adam_beta2=cfg.optim.adam_beta2,
        adam_eps=cfg.optim.adam_eps,
        clip_grad=cfg.optim.clip_grad,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        params_dtype=DTYPES[dtype],
        initial_loss_scale=cfg.precision.initial_loss_scale,
        min_loss_scale=cfg.precision.min_loss_scale,
        loss_scale_window=cfg.precision.loss_scale_window,
        hysteresis=cfg.precision.hysteresis,
        use_distributed_optimizer=cfg.parallelism.use_distributed_optimizer,
        overlap_param_gather=cfg.parallelism.overlap_param_gather,
    )
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        # megatron-core 0.16.1 without Transformer Engine and apex: on CPU it adds up in fp32 and is off by 1e-5 for
        # large tensors, by more or less as a layout cuts them; on CUDA it waits for the device once a tensor. It takes
        # no other function. tests/models/test_megatron_contract.py fails when these names are gone.
        clip_grads.l2_norm_impl = _l2_norm
    # megatron-core 0.16.1 without apex copies updated weights into the model's one tensor a launch, which with hundreds
    # of experts takes as long as a layer. tests/models/test_megatron_contract.py fails when the name is gone.
    optimizer_module._multi_tensor_copy_this_to_that = _copy_all
    # `FusedAdamW` keeps its step where apex's optimizer does: these flags, of the same version, make the distributed
    # optimizer look for it there when it saves and loads.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    with _our_class_in_megatron(FusedAdamW if cfg.optim.muon is None else Muon):
        optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    for part in optimizer_parts(optimizer):
        if updates_experts(part):
            # megatron-core 0.16.1 gives every part TP's group, by which copies count once in the gradient norm.
            part.tp_group = runtime.groups.expt_tp
        part.get_main_grads_for_grad_norm = _counted_gradients(part)
        if cfg.performance.offload_optimizer_moments:
            part.optimizer.offload_moments()
        if cfg.optim.muon is not None:
            connect_muon(cfg, part, model, runtime)
    return optimizer


def _counted_gradients(part: MegatronOptimizer) -> Callable[[], list[torch.Tensor]]:
    """Megatron's ``get_main_grads_for_grad_norm`` for this part, which asks once which parameters count on this rank.

    Megatron-Core 0.16.1 asks every parameter in every step, while the GPU waits: 15 ms for 1,500 weights of experts.
    """
    counted: list[torch.nn.Parameter] = []

    def gradients() -> list[torch.Tensor]:
        if not counted:
            counted.extend(p for p in part.get_parameters() if _counts(p, getattr(part, "tp_group", None)))
        return [p.grad for p in counted if p.grad is not None]

    return gradients


def _counts(parameter: torch.nn.Parameter, tp_group: Any) -> bool:
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, tp_group)


def _copy_all(this: list[torch.Tensor], that: list[torch.Tensor], overflow_buf: Any = None) -> None:  # noqa: ARG001
    if this:
        torch._foreach_copy_(that, this)  # few launches; underscored like all of PyTorch's lists of tensors


def _l2_norm(_chunk: int, _overflow: Any, tensors: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    """Norm over all tensors of all lists, float32 [1]; on CPU, where one accumulator takes it all, in float64."""
    flat = [tensor for group in tensors for tensor in group]
    if flat[0].is_cuda:
        norms = torch._foreach_norm(flat)
    else:
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in flat]
    return torch.stack(norms).norm().float()[None], None


@contextlib.contextmanager
def _our_class_in_megatron(ours: type[FusedAdamW]) -> Iterator[None]:
    """Let ``get_megatron_optimizer`` build this class.

    megatron-core 0.16.1 chooses the class from what is installed (Transformer Engine, apex, else torch's AdamW, whose
    state its distributed checkpoints stumble on) and takes none as an argument. tests/models/test_megatron_contract.py
    fails when one of these names is gone.
    """
    saved = (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam)
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = ours, False
    distrib_optimizer.Adam = ours
    try:
        yield
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = saved
