"""Activations of some layers wait for their backward pass in host memory.

While a layer runs forward, what autograd saves for it is copied to page-locked memory on a stream of its own. Offloaded
layers lie evenly among the others: a copy has the layers up to the next offloaded one to end in, where its GPU memory
is freed, and on the way back it starts as the backward pass reaches that one. How many layers can be offloaded at no
cost is a matter of the host's link (docs/benchmarks-gpu.md). The bits are the same.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nemo_llm.config.sections.arithmetic import evenly_spread
from nemo_llm.storage.host_buffers import page_locked

# Smaller ones are not worth a copy of their own.
_FEWEST_BYTES = 1 << 20


def offload_activations(layers: nn.ModuleList, count: int) -> None:
    """Offload ``count`` layers of a model chunk, at most all but one.

    On CPU, whose memory they are in anyway, nothing changes.
    """
    store = _HostStore()
    count = min(count, len(layers) - 1)
    for turn, place in enumerate(evenly_spread(count + 1, len(layers))):
        layer = layers[place]
        layer.forward = store.wrap(layer, first=turn == 0, offloaded=turn < count)


class _HostStore:
    """Host memory and streams that the layers of a chunk share, and the tape of the last offloaded layer."""

    def __init__(self) -> None:
        self.free: dict[int, list[Tensor]] = defaultdict(list)
        # Weakly, here and in the hook below: a graph outlives its backward pass, and must not keep what it fetched.
        self.last: Callable[[], _Tape | None] = _nothing
        self.out: Any = None
        self.into: Any = None

    def wrap(self, layer: nn.Module, first: bool, offloaded: bool) -> Callable[..., Any]:
        """The layer's forward; frees the device's copies of the offloaded layer before it, and fetches them back."""
        forward = layer.forward

        def with_store(*arguments: Any, **settings: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **settings)
            before = _nothing if first else self.last
            if (tape := before()) is not None:
                tape.release()
            if offloaded:
                tape = _Tape(self, {p.untyped_storage().data_ptr() for p in layer.parameters()})
                self.last = weakref.ref(tape)
                with saved_tensors_hooks(tape.pack, tape.unpack):
                    result = forward(*arguments, **settings)
                tape.copy_out()
            else:
                result = forward(*arguments, **settings)
            if before() is not None and result[0].requires_grad:
                result[0].register_hook(lambda _gradient: _fetch(before()))
            return result

        return with_store

    def take(self, num_bytes: int) -> Tensor:
        """Page-locked host memory of this size, uint8."""
        if self.free[num_bytes]:
            return self.free[num_bytes].pop()
        return page_locked(num_bytes, lock=True)


def _nothing() -> None:
    return None


def _fetch(tape: "_Tape | None") -> None:
    if tape is not None:
        tape.fetch()


class _Tape:
    """What one call of one layer saved: on the device until `release`, on the host, and on the device again."""

    def __init__(self, store: _HostStore, weights: set[int]) -> None:
        self.store, self.weights = store, weights
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

    def copy_out(self) -> None:
        """Start copying what was packed."""
        if not self.device:
            return
        store = self.store
        if store.out is None:
            store.out, store.into = torch.cuda.Stream(), torch.cuda.Stream()
        store.out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(store.out):
            for flat in self.device:
                host = store.take(flat.nbytes)
                host.view(flat.dtype).copy_(flat, non_blocking=True)
                self.host.append(host)
            self.done = store.out.record_event()

    def release(self) -> None:
        """Free the device's copies; what the device does next waits until the host has them."""
        if self.host:
            torch.cuda.current_stream().wait_event(self.done)
            self.device = [flat.new_empty(0) for flat in self.device]

    def fetch(self) -> None:
        """Start copying back, once."""
        if self.fetched is not None or not self.host:
            return
        store = self.store
        self.device = [
            torch.empty(host.numel() // empty.element_size(), dtype=empty.dtype, device=empty.device)
            for host, empty in zip(self.host, self.device, strict=True)
        ]
        store.into.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(store.into):
            for flat, host in zip(self.device, self.host, strict=True):
                flat.copy_(host.view(flat.dtype), non_blocking=True)
            self.fetched = store.into.record_event()

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that was packed."""
        if isinstance(packed, Tensor):
            return packed
        self.fetch()
        torch.cuda.current_stream().wait_event(self.fetched)
        number, shape, stride = packed
        return self.device[number].as_strided(shape, stride)

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
