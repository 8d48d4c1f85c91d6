"""What Megatron-Core's optimizers and its sum of gradients do not offer: names, private state, two methods anew.

Each function is declared in megatron/patches.toml: for which versions, why, and when it can go.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.utils import local_multi_tensor_l2_norm


def skip_empty_walk() -> None:
    """Let Megatron reset what its routers count between steps only where a router counts something."""

    def reset(config: Any, model: list[torch.nn.Module]) -> None:
        if config.moe_router_enable_expert_bias or "global_aux_loss" in config.moe_router_load_balancing_type:
            reset_model_temporary_tensors(config, model)

    # Its package has a function of the module's name.
    finalize: Any = importlib.import_module(reset_model_temporary_tensors.__module__)
    finalize.reset_model_temporary_tensors = reset


def use_norm(l2_norm: Callable[..., Any]) -> None:
    """Take this in place of Megatron's loop over tensors, where no kernel of others is installed."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


def build_with(ours: type, config: OptimizerConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer over these chunks with ``ours`` inside, which takes apex's arguments."""
    saved = (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam)
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = ours, False
    distrib_optimizer.Adam = ours
    try:
        return megatron_optimizer.get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = saved


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers of dense weights and of experts, those that have something to update."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def updates_experts(part: Any) -> bool:
    """Whether this part updates weights of experts, over ranks of their own, and not dense ones."""
    return any(group["is_expert_parallel"] for group in part.optimizer.param_groups)


def count_copies_once(part: Any, groups: Any) -> None:
    """Let the gradient norm of experts count copies over the ranks that hold them.

    Args:
        part: one of `optimizer_parts`.
        groups: Megatron's process groups.
    """
    if updates_experts(part):
        part.tp_group = groups.expt_tp


def connect_weights(
    part: Any, counts: Callable[[torch.Tensor], bool], join: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    """Tell an optimizer once where gradients and the model's 16-bit weights are; it writes the latter itself.

    Args:
        part: one of `optimizer_parts`, with a `FusedAdamW` inside.
        counts: whether a weight counts in the gradient norm of this rank.
        join: the same elements in fewer tensors, for that norm.
    """
    ranges = list(owned_ranges(part))
    mixed = isinstance(part, optimizer_module.MixedPrecisionOptimizer)
    if mixed:
        pairs = [(main, _range(parameter.detach(), start, main)) for parameter, start, main in ranges]
        part.optimizer.halves = {main: copy for main, copy in pairs if copy.dtype != torch.float32}
        part._copy_main_params_to_model_params = lambda: None
    counted = [main for _, _, main in ranges if counts(main)]
    if any(parameter.main_grad.dtype != torch.float32 for parameter, _, _ in ranges):
        part.get_main_grads_for_grad_norm = lambda: [main.grad for main in counted]  # Megatron makes them in each step
        return
    gradients = {main: _range(parameter.main_grad, start, main) for parameter, start, main in ranges}
    joined = join([gradients[main] for main in counted])
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


def owned_ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """(parameter, where this rank's range of it begins, the tensor of that range that ``part.optimizer`` updates).

    That tensor is the fp32 copy of a 16-bit parameter, and of an fp32 one its own memory.
    """
    if isinstance(part, distrib_optimizer.DistributedOptimizer):
        for maps in part.gbuf_ranges:
            for buckets in maps.values():
                for bucket in buckets:
                    for parameter in bucket["param_map"]:
                        start = part._get_model_param_range_map(parameter)["param"].start
                        group, place = part.model_param_group_index_map[parameter]
                        yield parameter, start, part.optimizer.param_groups[group]["params"][place]
    elif isinstance(part, optimizer_module.Float16OptimizerWithFloat16Params):
        halves, mains = chain(*part.float16_groups), chain(*part.fp32_from_float16_groups)
        for parameter, main in zip(halves, mains, strict=True):
            yield parameter, 0, main
        for parameter in chain(*part.fp32_from_fp32_groups):
            yield parameter, 0, parameter
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, 0, parameter


def update_weights(
    optimizer: Any, denominator: float, accept: Callable[[float | None], bool]
) -> tuple[bool, float | None]:
    """Clip and update unless ``accept`` refuses the gradient norm; returns (whether weights changed, the norm).

    The buffers hold the gradient of a sum, which ``denominator`` makes a mean. That and the clipping are one factor,
    which the optimizer applies as it reads them (`FusedAdamW.gradient_factor`): no pass over all gradients for either.
    Otherwise these are the steps of Megatron's ``ChainedOptimizer.step``, which leaves no room for a look between them.
    """
    overflow = optimizer.prepare_grads()
    norm = None if overflow else optimizer.get_grad_norm() / denominator
    if norm is None or not accept(norm):
        return False, norm
    for part in optimizer_parts(optimizer):
        largest = part.config.clip_grad
        clipping = min(largest / (norm + 1e-6), 1.0) if largest > 0.0 else 1.0  # as Megatron, 1e-6 from the limit
        part.optimizer.gradient_factor = clipping / denominator
    return bool(optimizer.step_with_ready_grads()), norm


def forget_gradients(chunk: DistributedDataParallel) -> None:
    """As Megatron's ``zero_grad_buffer``, but gradients of parameters marked ``overwrites_gradient`` become stale."""
    for parameter in chunk.params_with_grad:
        parameter.grad_added_to_main_grad = False
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        others = []
        for parameter in buffer.params:
            if hasattr(parameter, "overwrites_gradient"):
                parameter.main_grad.stale = True
            else:
                others.append(parameter.main_grad)
        if len(others) == len(buffer.params):
            buffer.reset()
        elif others:
            torch._foreach_zero_(others)  # one kernel for all; underscored like all of PyTorch's lists of tensors
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        group.reset()
