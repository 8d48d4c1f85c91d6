"""Megatron's optimizer (plain or distributed) from our section, with our AdamW or Muon inside."""

import contextlib
from collections.abc import Iterator
from functools import partial
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
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import local_multi_tensor_l2_norm

from nemo_llm.checkpoint.optimizer_state import optimizer_parts, owned_ranges, updates_experts
from nemo_llm.config import RunConfig
from nemo_llm.models.transformer_config import DTYPES
from nemo_llm.optim.adamw import FusedAdamW
from nemo_llm.optim.muon import Muon
from nemo_llm.optim.muon_matrices import connect_muon
from nemo_llm.parallel.runtime import ParallelRuntime

_MOST_JOINED = 1 << 25  # elements: a CPU makes a copy in float64


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
    # `FusedAdamW` keeps its step where apex's optimizer does: these flags, of the same version, make the distributed
    # optimizer look for it there when it saves and loads.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    with _our_class_in_megatron(FusedAdamW if cfg.optim.muon is None else Muon):
        optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    for part in optimizer_parts(optimizer):
        if updates_experts(part):
            # megatron-core 0.16.1 gives every part TP's group, by which copies count once in the gradient norm.
            part.tp_group = runtime.groups.expt_tp
        _connect(part)
        if cfg.performance.offload_optimizer_moments:
            part.optimizer.offload_moments()
        if cfg.optim.muon is not None:
            connect_muon(cfg, part, model, runtime)
    return optimizer


def _connect(part: Any) -> None:
    """Tell an optimizer once where gradients and the model's 16-bit weights are; it writes the latter itself.

    Megatron-Core 0.16.1 looks for both in every step, one parameter after another, asks which of them count in the
    gradient norm, and copies the weights in a pass of its own: with 1,500 weights of experts the GPU waits for the host
    as long as two layers take. tests/models/test_megatron_contract.py fails when a method is gone.
    """
    ranges = list(owned_ranges(part))
    mixed = isinstance(part, MixedPrecisionOptimizer)
    if mixed:
        pairs = [(main, _range(parameter.detach(), start, main)) for parameter, start, main in ranges]
        part.optimizer.halves = {main: copy for main, copy in pairs if copy.dtype != torch.float32}
        part._copy_main_params_to_model_params = lambda: None
    counted = [main for _, _, main in ranges if _counts(main, part.tp_group)]
    if any(parameter.main_grad.dtype != torch.float32 for parameter, _, _ in ranges):
        part.get_main_grads_for_grad_norm = lambda: [main.grad for main in counted]  # Megatron makes them in each step
        return
    gradients = {main: _range(parameter.main_grad, start, main) for parameter, start, main in ranges}
    joined = _joined([gradients[main] for main in counted])
    part.get_main_grads_for_grad_norm = lambda: joined
    part.optimizer.gradients_stay = True
    if mixed:
        for main, gradient in gradients.items():
            main.grad = gradient
        # Parameters of the model itself have none outside an update: a backward pass would add to it.
        own = [parameter for parameter, _, main in ranges if main is parameter]
        part._copy_model_grads_to_main_grads = partial(_set_gradients, own, gradients)
        part.zero_grad = lambda *_: _set_gradients(own, {})


def _range(whole: torch.Tensor, start: int, main: torch.Tensor) -> torch.Tensor:
    """The elements of ``whole`` that ``main`` stands for, in its shape."""
    return whole.view(-1)[start : start + main.numel()].view(main.shape)


def _set_gradients(parameters: list[torch.Tensor], gradients: dict[torch.Tensor, torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = gradients.get(parameter)


def _joined(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same elements in fewer tensors, flat: small ones that lie one behind the other in a buffer are one."""
    joined: list[torch.Tensor] = []
    for tensor in sorted((t for t in tensors if t.numel()), key=torch.Tensor.data_ptr):
        last = joined[-1] if joined else tensor
        total = last.numel() + tensor.numel()
        storage = last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if storage and last.data_ptr() + last.nbytes == tensor.data_ptr() and total <= _MOST_JOINED:
            joined[-1] = last.as_strided((total,), (1,))
        else:
            joined.append(tensor.view(-1))
    return joined


def _counts(parameter: torch.nn.Parameter, tp_group: Any) -> bool:
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, tp_group)


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
