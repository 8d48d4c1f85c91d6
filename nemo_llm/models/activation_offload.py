"""Activations of some layers wait for their backward pass in host memory.

While a layer runs forward, what autograd saves for it is copied to page-locked memory on a stream of its own, and its
GPU memory is freed two layers later; while the layer behind it runs backward, it comes back. The copies cost no time as
long as they are hidden behind the layers that are not offloaded: how many can be is a matter of the host's link
(docs/benchmarks-gpu.md). The bits are the same.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Smaller ones are not worth a copy of their own.
_FEWEST_BYTES = 1 << 20
# Layers whose copies may still be under way while the next one computes.
_LAYERS_UNDER_WAY = 1


def offload_activations(layers: nn.ModuleList, count: int) -> None:
    """Offload the first ``count`` layers of a model chunk: those whose activations wait longest.

    On CPU, whose memory they are in anyway, nothing changes.
    """
    store = _HostStore()
    for number, layer in enumerate(layers):
        layer.forward = store.wrap(layer, number, offloaded=number < count)


class _HostStore:
    """Host memory and streams that the layers of a chunk share, and the tapes that are being copied."""

    def __init__(self) -> None:
        self.free: dict[int, list[Tensor]] = defaultdict(list)
        self.under_way: deque[_Tape] = deque()
        self.last: _Tape | None = None
        self.out: Any = None
        self.into: Any = None

    def wrap(self, layer: nn.Module, number: int, offloaded: bool) -> Callable[..., Any]:
        """The layer's forward, with what it saves going to the host where ``offloaded``."""
        forward = layer.forward

        def with_store(*arguments: Any, **settings: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **settings)
            self.release()
            if not offloaded:
                return forward(*arguments, **settings)
            tape = _Tape(self, {p.untyped_storage().data_ptr() for p in layer.parameters()})
            tape.before = None if number == 0 else self.last
            self.last = tape
            with saved_tensors_hooks(tape.pack, tape.unpack):
                result = forward(*arguments, **settings)
            tape.copied()
            return result

        return with_store

    def release(self) -> None:
        """Free GPU memory of layers that lie behind; the device waits for their copies where it must."""
        while len(self.under_way) > _LAYERS_UNDER_WAY:
            self.under_way.popleft().release()

    def take(self, num_bytes: int) -> Tensor:
        """Page-locked host memory of this size, uint8."""
        if self.free[num_bytes]:
            return self.free[num_bytes].pop()
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        return memory


class _Tape:
    """What one call of one layer saved: on the device until `release`, on the host, and on the device again."""

    def __init__(self, store: _HostStore, weights: set[int]) -> None:
        self.store, self.weights = store, weights
        self.before: _Tape | None = None
        self.numbers: dict[tuple, int] = {}
        self.device: list[Tensor] = []
        self.host: list[Tensor] = []
        self.done: Any = None
        self.fetched: Any = None

    def pack(self, saved: Tensor) -> Any:
        """A number in place of a large dense tensor that is no weight; others stay as they are."""
        if not saved.is_cuda or saved.nbytes < _FEWEST_BYTES or not _is_dense(saved):
            return saved
        start = saved.untyped_storage().data_ptr()
        if start in self.weights:
            return saved
        key = (start, saved.storage_offset(), saved.dtype, saved.numel())
        if key not in self.numbers:
            self.numbers[key] = len(self.device)
            self.device.append(saved.detach().as_strided((saved.numel(),), (1,)))
        return self.numbers[key], saved.shape, saved.stride()

    def copied(self) -> None:
        """Start copying what was packed."""
        store, now = self.store, torch.cuda.current_stream() if self.device else None
        if now is None:
            return
        if store.out is None:
            store.out, store.into = torch.cuda.Stream(), torch.cuda.Stream()
        store.out.wait_stream(now)
        with torch.cuda.stream(store.out):
            for flat in self.device:
                host = store.take(flat.nbytes)
                host.view(flat.dtype).copy_(flat, non_blocking=True)
                self.host.append(host)
            self.done = store.out.record_event()
        store.under_way.append(self)

    def release(self) -> None:
        """Free the device's copies once the host has them."""
        torch.cuda.current_stream().wait_event(self.done)
        self.device = [flat.new_empty(0) for flat in self.device]

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that was packed; the layer before this one starts on its way back."""
        if isinstance(packed, Tensor):
            return packed
        self.fetch()
        torch.cuda.current_stream().wait_event(self.fetched)
        if self.before is not None:
            self.before.fetch()
        number, shape, stride = packed
        return self.device[number].as_strided(shape, stride)

    def fetch(self) -> None:
        """Start copying back, once; what was not released yet is still there."""
        if self.fetched is not None or not self.host:
            return
        store, now = self.store, torch.cuda.current_stream()
        if self in store.under_way:
            store.under_way.remove(self)
            self.fetched = now.record_event()
            return
        self.device = [
            torch.empty(host.numel() // empty.element_size(), dtype=empty.dtype, device=empty.device)
            for host, empty in zip(self.host, self.device, strict=True)
        ]
        store.into.wait_stream(now)
        with torch.cuda.stream(store.into):
            for flat, host in zip(self.device, self.host, strict=True):
                flat.copy_(host.view(flat.dtype), non_blocking=True)
            self.fetched = store.into.record_event()

    def __del__(self) -> None:
        # The last reader has waited for the copies back: the next copy out, which waits for it, may use the memory.
        for host in self.host:
            self.store.free[host.numel()].append(host)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, each place once."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True
