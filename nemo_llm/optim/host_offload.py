"""Adam's moments in host memory, passed through the GPU a window at a time while it updates.

The arithmetic is the same kernel's on the same device, so that no bit changes; the GPU is spared 8 bytes a parameter.
A window's copy in, update and copy out run on three streams: what a step costs is the larger of the copies, at the
speed of the host's link.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_llm.storage.host_buffers import page_locked

_WINDOW_ELEMENTS = 1 << 25
_SLOTS = 3

Lists = tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor]]
Update = Callable[[Lists], None]


@dataclass
class _Window:
    """Ranges ``(parameter, start, stop)`` of flattened parameters that are updated at once; their moments [2, n]."""

    ranges: list[tuple[Tensor, int, int]]
    host: Tensor

    def update(self, memory: Tensor, update: Update, wanted: set[Tensor]) -> None:
        """Update those of the wanted parameters, with their moments in ``memory`` [2, at least n]."""
        lists: Lists = ([], [], [], [])
        at = 0
        for parameter, start, stop in self.ranges:
            end = at + stop - start
            if parameter in wanted:
                assert parameter.grad is not None
                lists[0].append(parameter.view(-1)[start:stop])
                lists[1].append(parameter.grad.view(-1)[start:stop])
                lists[2].append(memory[0, at:end])
                lists[3].append(memory[1, at:end])
            at = end
        update(lists)


@dataclass
class _Device:
    """Streams, and memory that windows pass through in turn."""

    slots: list[Tensor]
    into: Any = field(default_factory=torch.cuda.Stream)
    out: Any = field(default_factory=torch.cuda.Stream)


class HostMoments:
    """The moments of many parameters. On CPU, whose memory they are in anyway, they are updated where they lie."""

    def __init__(self) -> None:
        self._windows: list[_Window] = []
        self._device: _Device | None = None

    def add(self, parameters: list[Tensor], state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Make moments of zeros for these parameters, and enter them into ``state``."""
        total = sum(parameter.numel() for parameter in parameters)
        if not total:
            return
        # Both moments of a window side by side, and those of a parameter in one stretch each.
        memory = page_locked(8 * total, parameters[0].is_cuda).view(torch.float32).view(2, total).zero_()
        ranges: list[tuple[Tensor, int, int]] = []
        at, filled = 0, 0
        for parameter in parameters:
            size = parameter.numel()
            first, second = memory[:, at : at + size]
            state[parameter].update(exp_avg=first.view(parameter.shape), exp_avg_sq=second.view(parameter.shape))
            for start in range(0, size, _WINDOW_ELEMENTS):
                stop = min(start + _WINDOW_ELEMENTS, size)
                if filled + stop - start > _WINDOW_ELEMENTS:
                    self._windows.append(_Window(ranges, memory[:, at + start - filled : at + start]))
                    ranges, filled = [], 0
                ranges.append((parameter, start, stop))
                filled += stop - start
            at += size
        self._windows.append(_Window(ranges, memory[:, total - filled :]))

    def wait(self) -> None:
        """Return when the last update's moments are in host memory."""
        if self._device is not None:
            self._device.out.synchronize()

    def update(self, parameters: list[Tensor], update: Update) -> None:
        """Call ``update(parameters, gradients, first moments, second moments)`` for those of each window."""
        wanted = set(parameters)
        windows = [window for window in self._windows if any(part[0] in wanted for part in window.ranges)]
        if not parameters[0].is_cuda:
            for window in windows:
                window.update(window.host, update, wanted)
            return
        if self._device is None:
            largest = max(window.host.shape[1] for window in self._windows)
            self._device = _Device([torch.empty(2, largest, device=parameters[0].device) for _ in range(_SLOTS)])
        device, now = self._device, torch.cuda.current_stream()
        device.into.wait_stream(device.out)
        free: list[Any] = [None] * _SLOTS
        for number, window in enumerate(windows):
            slot, size = device.slots[number % _SLOTS], window.host.shape[1]
            with torch.cuda.stream(device.into):
                if free[number % _SLOTS] is not None:
                    device.into.wait_event(free[number % _SLOTS])
                for there, here in zip(slot, window.host, strict=True):
                    there[:size].copy_(here, non_blocking=True)
            now.wait_stream(device.into)
            window.update(slot, update, wanted)
            with torch.cuda.stream(device.out):
                device.out.wait_stream(now)
                for there, here in zip(slot, window.host, strict=True):
                    here.copy_(there[:size], non_blocking=True)
                free[number % _SLOTS] = device.out.record_event()
