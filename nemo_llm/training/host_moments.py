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

from nemo_llm.checkpoint.snapshot import page_locked

_WINDOW_ELEMENTS = 1 << 25
_SLOTS = 3

Update = Callable[[list[Tensor], list[Tensor], list[Tensor]], None]


@dataclass
class _Window:
    """Parameters that are updated at once, and both their moments, [2, n], in host memory."""

    parameters: list[Tensor]
    host: Tensor

    def views(self, memory: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The first and the second moments of each parameter in ``memory`` [2, at least n]."""
        sizes = [parameter.numel() for parameter in self.parameters]
        first, second = (
            [part.view(p.shape) for part, p in zip(row[: sum(sizes)].split(sizes), self.parameters, strict=True)]
            for row in memory
        )
        return first, second


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
        chosen: list[Tensor] = []
        for number, parameter in enumerate(parameters):
            chosen.append(parameter)
            filled = sum(p.numel() for p in chosen)
            if filled < _WINDOW_ELEMENTS and number + 1 < len(parameters):
                continue
            memory = page_locked(8 * filled, parameter.is_cuda).view(torch.float32).view(2, filled).zero_()
            window = _Window(chosen, memory)
            for one, first, second in zip(chosen, *window.views(memory), strict=True):
                state[one].update(exp_avg=first, exp_avg_sq=second)
            self._windows.append(window)
            chosen = []

    def wait(self) -> None:
        """Return when the last update's moments are in host memory."""
        if self._device is not None:
            self._device.out.synchronize()

    def update(self, parameters: list[Tensor], update: Update) -> None:
        """Call ``update(parameters, first moments, second moments)`` for those of each window that are given."""
        wanted = set(parameters)
        windows = [window for window in self._windows if not wanted.isdisjoint(window.parameters)]
        if not parameters[0].is_cuda:
            for window in windows:
                _update_window(window, window.host, wanted, update)
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
            _update_window(window, slot, wanted, update)
            with torch.cuda.stream(device.out):
                device.out.wait_stream(now)
                for there, here in zip(slot, window.host, strict=True):
                    here.copy_(there[:size], non_blocking=True)
                free[number % _SLOTS] = device.out.record_event()


def _update_window(window: _Window, memory: Tensor, wanted: set[Tensor], update: Update) -> None:
    first, second = window.views(memory)
    chosen = [number for number, parameter in enumerate(window.parameters) if parameter in wanted]
    update([window.parameters[n] for n in chosen], [first[n] for n in chosen], [second[n] for n in chosen])
