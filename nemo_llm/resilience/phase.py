"""Where a rank is in its step: read by the watchdog, summed up for the straggler report."""

import time
from dataclasses import dataclass, field
from enum import StrEnum


class StepPhase(StrEnum):
    """What a rank is at, in the order of a step; the watchdog has a time limit for each."""

    START = "start"
    DATA = "data"
    FORWARD_BACKWARD = "forward and backward"
    UPDATE = "update"
    AGREE = "agree"
    REPORT = "report"
    VALIDATION = "validation"
    EVALUATION = "evaluation"
    SAVE = "save"
    END = "end"

    @property
    def order(self) -> int:
        """Its place within a step."""
        return list(StepPhase).index(self)


@dataclass
class RunProgress:
    """Where this rank is. The main thread calls `enter`; anybody may read.

    Attributes:
        step: updates made.
        phase: what it is at.
        since: when the phase began, `time.monotonic` seconds.
        seconds: time spent in each phase since `take_seconds`.
    """

    step: int = 0
    phase: StepPhase = StepPhase.START
    since: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def enter(self, phase: StepPhase, step: int | None = None) -> None:
        """Go on to the next phase, or begin the same anew."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now
        if step is not None:
            self.step = step

    def take_seconds(self) -> dict[str, float]:
        """Time in each phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken
