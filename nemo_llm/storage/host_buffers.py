"""A copy of tensors in host memory, taken while the next step already computes."""

from typing import Any

import torch


class HostBuffer:
    """One stretch of host memory for the tensors of a checkpoint, kept from save to save; page-locked beside a GPU.

    A device copies into page-locked memory at full speed and without the host waiting. PyTorch's own allocator of it
    rounds every tensor up to a power of two; this is one allocation of the exact size.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    @property
    def num_bytes(self) -> int:
        """Size of the host memory that is held."""
        return self._memory.numel()

    def views_like(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Host tensors of the same shapes and types, in this memory, which grows where it must."""
        starts, total = [], 0
        for tensor in tensors:
            starts.append(total)
            total += -(-tensor.numel() * tensor.element_size() // 64) * 64
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        if total > self.num_bytes:
            self._grow(total, on_cuda)
        return [
            self._memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]

    def _grow(self, total: int, on_cuda: bool) -> None:
        if self._locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._memory = page_locked(total, on_cuda)
        self._locked = on_cuda


def page_locked(num_bytes: int, lock: bool) -> torch.Tensor:
    """Host memory of exactly this size, uint8; with ``lock`` a GPU copies to and from it while the host goes on."""
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if lock:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    return memory


class Snapshot:
    """Copies that are under way from the device; see `wait_on_device` and `wait_on_host`."""

    def __init__(self, buffer: HostBuffer, tensors: list[torch.Tensor]) -> None:
        """Start copying ``tensors``; on CPU they are copied on return."""
        self.tensors = buffer.views_like(tensors)
        self._sources = tensors  # alive until they are copied
        self._done: Any = None
        if any(tensor.is_cuda for tensor in tensors):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._copy()
                self._done = stream.record_event()
        else:
            self._copy()

    def _copy(self) -> None:
        for host, source in zip(self.tensors, self._sources, strict=True):
            host.copy_(source, non_blocking=True)

    def wait_on_device(self) -> None:
        """Let the device finish the copies before it does what comes next; the host goes on."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def wait_on_host(self) -> None:
        """Return when the copies are there."""
        if self._done is not None:
            self._done.synchronize()
        self._sources = []
