"""Asking a run to stop: by signal, by wall-clock budget, or by a file; noticed at the end of a step.

Nothing here interrupts a step. A signal only leaves a note; the loop polls, the ranks agree, and the run saves and
ends in order. One rank's note is enough, so that ranks may be told at different moments.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from nemo_llm.errors import ExitCode

STOP_FILE_NAME = "STOP"

# Slurm's notice (--signal=B:USR1), the scheduler's or torchrun's farewell, and Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# This many Ctrl-C within this time mean: at once, without saving.
_IMPATIENT_SIGINTS = 3
_IMPATIENT_SECONDS = 5.0

# A shared file system is asked no more often than this for the stop file.
_STOP_FILE_INTERVAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a run was asked to stop.

    Attributes:
        kind: `signal`, `time_limit` or `stop_file`.
        detail: one phrase for the log and ``exit.json``, for example ``SIGUSR1``.
        unix_time: when it was noticed, in seconds since 1970.
    """

    kind: Literal["signal", "time_limit", "stop_file"]
    detail: str
    unix_time: float

    @property
    def exit_code(self) -> ExitCode:
        """PREEMPTED (queue me again), but DONE for a stop file: who made it wants the run to end, not to come back."""
        return ExitCode.DONE if self.kind == "stop_file" else ExitCode.PREEMPTED


class StopSignals:
    """Context manager that takes SIGTERM, SIGUSR1 and SIGINT, and is polled at step ends.

    The first reason is kept. Later signals are counted and do nothing, so that a save in progress goes on; only the
    third SIGINT within five seconds raises KeyboardInterrupt. Leaving the context restores the handlers before.

    Args:
        run_dir: folder watched for a file named ``STOP``, which `stopped` removes; None watches none. Give it to
            the first rank alone.
        max_time_minutes: budget counted from entering the context; None for no limit.
        clock: monotonic seconds.
    """

    def __init__(
        self, run_dir: Path | None, max_time_minutes: float | None, clock: Callable[[], float] = time.monotonic
    ):
        self.signal_count = 0
        self._stop_file = None if run_dir is None else run_dir / STOP_FILE_NAME
        self._max_time_minutes = max_time_minutes
        self._clock = clock
        self._deadline: float | None = None
        self._next_look = 0.0
        self._reason: StopReason | None = None
        self._sigint_times: list[float] = []
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Start counting and install the handlers; in the main thread only, as Python demands."""
        self._next_look = self._clock()
        if self._max_time_minutes is not None:
            self._deadline = self._next_look + 60 * self._max_time_minutes
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers that stood before."""
        signal.set_wakeup_fd(self._wakeup_before)
        if self._pipe is not None:
            ends, self._pipe = self._pipe, None
            for end in ends:
                os.close(end)
        for number, handler in self._handlers_before.items():
            # None stands for a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def reason(self) -> StopReason | None:
        """The first reason that was noticed. For other threads: Python runs a handler only when the main thread comes
        back from what it waits in, but writes the signal's number into a pipe at once."""
        if self._reason is None and self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._pipe[0], 64):
                    if number in _SIGNALS:
                        self._note("signal", signal.Signals(number).name)
        return self._reason

    def poll(self) -> StopReason | None:
        """The first reason to stop, or None. Cheap enough for every step."""
        if self._reason is None and self._deadline is not None and self._clock() >= self._deadline:
            self._note("time_limit", f"trainer.max_time_minutes = {self._max_time_minutes:g} is used up")
        if self._reason is None and self._stop_file is not None and self._clock() >= self._next_look:
            self._next_look = self._clock() + _STOP_FILE_INTERVAL_SECONDS
            if self._stop_file.exists():
                self._note("stop_file", f"file {self._stop_file}")
        return self._reason

    def stopped(self, reason: StopReason | None) -> None:
        """All is saved, for the reason that the ranks agreed on: a stop file that was obeyed is removed.

        Not before: a run that is killed while it saves, and started again, must still find it. Left there, it would
        stop the next run in this folder at its first step.
        """
        if reason is not None and reason.kind == "stop_file" and self._stop_file is not None:
            with contextlib.suppress(OSError):
                self._stop_file.unlink()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_count += 1
        self._note("signal", signal.Signals(number).name)
        if number == signal.SIGINT:
            self._sigint_times = [*self._sigint_times, self._clock()][-_IMPATIENT_SIGINTS:]
            impatient = len(self._sigint_times) == _IMPATIENT_SIGINTS
            if impatient and self._sigint_times[-1] - self._sigint_times[0] <= _IMPATIENT_SECONDS:
                raise KeyboardInterrupt

    def _note(self, kind: Literal["signal", "time_limit", "stop_file"], detail: str) -> None:
        if self._reason is None:
            self._reason = StopReason(kind, detail, time.time())
