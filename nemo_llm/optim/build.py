"""Megatron's optimizer (plain or distributed) from our section, with our AdamW or Muon inside."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from nemo_llm.config import RunConfig
from nemo_llm.megatron import optimizer as megatron
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
    megatron.use_functions(_l2_norm, _copy_all)
    optimizer = megatron.build_with(FusedAdamW if cfg.optim.muon is None else Muon, config, model)
    for part in megatron.optimizer_parts(optimizer):
        megatron.count_copies_once(part, runtime.groups)
        megatron.take_gradients_from(part, _counted_gradients(part))
        if cfg.performance.offload_optimizer_moments:
            part.optimizer.offload_moments()
        if cfg.optim.muon is not None:
            connect_muon(cfg, part, model, runtime)
    return optimizer


def _counted_gradients(part: MegatronOptimizer) -> Callable[[], list[torch.Tensor]]:
    """The gradients of this part in the norm, which asks once which parameters count on this rank.

    Megatron asks every parameter in every step, while the GPU waits: 15 ms for 1,500 weights of experts.
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
