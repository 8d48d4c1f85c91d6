"""Run Megatron-Core's CUDA code on a machine that has no CUDA, by mapping the device and nothing else.

Megatron-Core names the CUDA device in some 800 lines, but all of them reach PyTorch through a few doors: the
``device=`` argument, ``Tensor.cuda()`` and ``Tensor.type()``, streams and events, pinned memory and the CUDA generator.
This module answers at those doors with the CPU. The arithmetic that runs is Megatron-Core's own.

The mapping is installed once a process, before the first model is built, and refuses to install where CUDA is present:
it must never hide a real GPU.
"""

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class CudaOnCpu(TorchFunctionMode):
    """Rewrites device arguments of torch calls from ``cuda`` to ``cpu`` while it is active (in this thread)."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        else:
            kwargs = {}
        answer = _TENSOR_METHODS.get(func)
        if answer is not None:
            return answer(func, args, kwargs)
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _same_tensor(func: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0]


def _nothing(func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    return None


def _cuda_type_name(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    # Megatron's optimizers sort parameters by the name that Tensor.type() gives, and know the CUDA names alone.
    result = func(*args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def _to_cpu_instead(func: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    if len(args) > 1 and _names_cuda(args[1]):
        args = (args[0], CPU, *args[2:])
    return func(*args, **kwargs)


_TENSOR_METHODS: dict[Callable, Callable[[Callable, tuple, dict[str, Any]], Any]] = {
    torch.Tensor.cuda: _same_tensor,
    torch.Tensor.pin_memory: _same_tensor,
    torch.Tensor.record_stream: _nothing,
    torch.Tensor.type: _cuda_type_name,
    torch.Tensor.to: _to_cpu_instead,
}


class _CpuStream:
    """Stands where a CUDA stream or event is expected; on CPU every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU

    def __enter__(self) -> "_CpuStream":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "_CpuStream | None" = None) -> "_CpuStream":
        return event or self

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    # gloo takes plain lists for the split sizes; Megatron's token dispatcher passes NumPy arrays and tensors.
    return _TORCH_ALL_TO_ALL_SINGLE(
        output, input, _plain_list(output_split_sizes), _plain_list(input_split_sizes), group, async_op
    )


_TORCH_ALL_TO_ALL_SINGLE = dist.all_to_all_single
_TORCH_ALL_GATHER = dist.all_gather
_TORCH_REDUCE_SCATTER = dist.reduce_scatter


def _all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    # Experts under tensor parallelism gather unequal numbers of tokens, which NCCL can and gloo cannot.
    if len({part.shape for part in tensor_list}) == 1:
        return _TORCH_ALL_GATHER(tensor_list, tensor, group, async_op)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    for part, source in zip(tensor_list, ranks, strict=True):
        if source == dist.get_rank():
            part.copy_(tensor)
        received = part.contiguous()
        dist.broadcast(received, source, group)
        part.copy_(received)
    return None


def _reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    if len({part.shape for part in input_list}) == 1:
        return _TORCH_REDUCE_SCATTER(output, input_list, op, group, async_op)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    for part, destination in zip(input_list, ranks, strict=True):
        reduced = part.clone()
        dist.reduce(reduced, destination, op, group)
        if destination == dist.get_rank():
            output.copy_(reduced)
    return None


def _plain_list(sizes: Any) -> list[int] | None:
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def install() -> None:
    """Map CUDA onto the CPU for the rest of this process; does nothing when already installed.

    Raises:
        RuntimeError: when a CUDA device is present, which the mapping would hide.
    """
    if is_installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            f"the CPU mapping was asked for where CUDA is present ({torch.cuda.get_device_name(0)}): it would hide the "
            "GPU. Use trainer.accelerator=cuda, or hide the GPU with CUDA_VISIBLE_DEVICES=''."
        )
    from megatron.core.tensor_parallel import random

    _replace_cuda_functions()
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    dist.all_to_all_single = _all_to_all_single
    dist.all_gather, dist.reduce_scatter = _all_gather, _reduce_scatter
    CudaOnCpu().__enter__()


def is_installed() -> bool:
    """Whether this process already runs Megatron's CUDA code on the CPU."""
    return dist.all_to_all_single is _all_to_all_single


def _replace_cuda_functions() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        # One function object for each name: torch.compile keeps its rules by object and refuses an object seen twice.
        setattr(cuda, name, lambda *args, **kwargs: None)
    # manual_seed_all stays: torch.manual_seed itself calls it, and without CUDA it does nothing.
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.Stream = type("Stream", (_CpuStream,), {})
    cuda.Event = type("Event", (_CpuStream,), {})
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda device=None: _CpuStream()
    cuda.default_stream = lambda device=None: _CpuStream()
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        multi_processor_count=1, major=0, minor=0, total_memory=0
    )
    cuda.is_current_stream_capturing = lambda: False
