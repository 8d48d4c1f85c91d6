"""Hangs: seen by a thread of every rank, told in one sentence that names the late rank, ended on all ranks.

Ranks tell each other where they are through the key-value store that they met at, which needs no collective and works
over gloo and NCCL alike. A rank whose main thread has not moved on for the time limit asks for everybody's state; the
lowest rank that still answers says who is late: who does not answer at all, else who is furthest behind, else who
is not waiting for others.
"""

import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_llm.config.trainer import TrainerConfig
from nemo_llm.errors import ExitCode
from nemo_llm.training.progress import PHASES, Progress
from nemo_llm.training.rundir import write_exit
from nemo_llm.training.signals import StopSignals

# These may take long without a sign of life.
_SLOW_PHASES = {"start", "validation", "save", "end"}
# The watchdog speaks before the collectives' own time limit ends ranks with a traceback each.
_SHARE_OF_LIMIT = 0.9
_FRAMES = 4


@dataclass(frozen=True)
class RankState:
    """What a rank says of itself when a hang is suspected."""

    rank: int
    step: int
    phase: str
    seconds: float
    stack: tuple[str, ...]

    @property
    def waits_for_others(self) -> bool:
        """Whether the innermost frame is in a collective."""
        return "torch/distributed" in self.stack[0] if self.stack else False


def name_late_rank(states: Sequence[RankState], world_size: int, limit_seconds: float) -> str:
    """One sentence on who is late, from the states of the ranks that answered."""
    silent = sorted(set(range(world_size)) - {state.rank for state in states})
    if silent:
        ranks = ", ".join(map(str, silent))
        return f"hang: rank {ranks} gives no sign of life; the others wait for it since {limit_seconds:.0f} s"
    behind = min(states, key=lambda s: (s.step, PHASES.index(s.phase), s.waits_for_others, -s.seconds))
    return (
        f"hang: rank {behind.rank} is late: after step {behind.step} it is in phase {behind.phase!r} for "
        f"{behind.seconds:.0f} s, at {' < '.join(behind.stack)}"
    )


class Watchdog:
    """Context manager around the training loop; ends the process with `ExitCode.HANG` when no rank moves on.

    Args:
        progress: of this rank.
        run_dir: where the first words are left, with the flight recorder's dump on CUDA.
        trainer: the time limits of the start, of validation and of saves, of any other phase, and of stopping.
        signals: what tells this rank to stop; it must have done so within ``trainer.stop_deadline_minutes``.
    """

    def __init__(self, progress: Progress, run_dir: Path, trainer: TrainerConfig, signals: StopSignals) -> None:
        self._progress, self._run_dir, self._signals = progress, run_dir, signals
        self._slow = 60 * trainer.first_step_timeout_minutes * _SHARE_OF_LIMIT
        self._limit = 60 * trainer.step_timeout_minutes * _SHARE_OF_LIMIT
        self._stop_minutes = trainer.stop_deadline_minutes
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._first_step = progress.step
        self._main = threading.main_thread()
        self._stop = threading.Event()
        self._interval = min(1.0, self._limit / 10)
        self._alarm = f"nemo_llm/hang/{id_of_attempt()}"
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._check_stop_deadline()
            slow = self._progress.phase in _SLOW_PHASES or self._progress.step <= self._first_step
            late = time.monotonic() - self._progress.since > (self._slow if slow else self._limit)
            try:
                if late or (self._world_size > 1 and self._store.check([self._alarm])):
                    self._end(slow)
            except (RuntimeError, OSError):  # the store is gone: the rank that held it has ended
                if late:
                    self._end(slow)

    def _check_stop_deadline(self) -> None:
        """End where the step in hand and the save take longer than the notice allows; the checkpoint before stays."""
        reason = self._signals.reason
        if reason is None or self._stop_minutes is None or time.time() - reason.unix_time < 60 * self._stop_minutes:
            return
        sentence = (
            f"{reason.detail}: rank {self._rank} could not stop and save within trainer.stop_deadline_minutes = "
            f"{self._stop_minutes:g}; it is in phase {self._progress.phase!r} after step {self._progress.step}. The "
            "last complete checkpoint stays"
        )
        print(sentence, file=sys.stderr, flush=True)
        write_exit(self._run_dir, ExitCode.PREEMPTED, sentence, self._progress.step)
        os._exit(ExitCode.PREEMPTED.of_process())

    def _end(self, slow: bool) -> None:
        """Say where this rank is, let the lowest live rank speak, and end."""
        own = RankState(
            self._rank,
            self._progress.step,
            self._progress.phase,
            time.monotonic() - self._progress.since,
            self._stack(),
        )
        states = [own] if self._world_size == 1 else self._exchange(own)
        limit = self._slow if slow else self._limit
        sentence = name_late_rank(states, self._world_size, limit)
        _dump_flight_recorder(self._run_dir, self._rank)
        if own.rank == min(state.rank for state in states):
            print(sentence, file=sys.stderr, flush=True)
            write_exit(self._run_dir, ExitCode.HANG, sentence, own.step)
        else:
            time.sleep(1.0)  # a launcher ends all ranks as soon as one has: the speaker goes first
        os._exit(ExitCode.HANG)

    def _exchange(self, own: RankState) -> list[RankState]:
        self._store.set(self._alarm, "1")
        self._store.set(f"{self._alarm}/{own.rank}", json.dumps(own.__dict__))
        until = time.monotonic() + 5 * self._interval + 2.0
        found: dict[int, RankState] = {own.rank: own}
        while len(found) < self._world_size and time.monotonic() < until:
            for rank in set(range(self._world_size)) - found.keys():
                key = f"{self._alarm}/{rank}"
                if self._store.check([key]):
                    content = json.loads(self._store.get(key))
                    found[rank] = RankState(**{**content, "stack": tuple(content["stack"])})
            time.sleep(self._interval / 4)
        return list(found.values())

    def _stack(self) -> tuple[str, ...]:
        """Innermost frames of the main thread, ours among them."""
        frame = sys._current_frames().get(self._main.ident or 0)  # public but for its name; Python 3.11 and 3.12
        if frame is None:
            return ()
        frames = list(reversed(traceback.extract_stack(frame)))
        ours = [f for f in frames[1:] if "nemo_llm" in f.filename]
        shown = [frames[0], *ours][:_FRAMES]
        return tuple(f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} in {f.name}" for f in shown)


def id_of_attempt() -> str:
    """Tells the attempts of an elastic launcher apart, which share a store."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _dump_flight_recorder(run_dir: Path, rank: int) -> None:
    """The last collectives of this rank as NCCL's flight recorder holds them, for ``torchfrtrace``."""
    if not torch.cuda.is_available() or dist.get_backend() != "nccl":
        return
    folder = run_dir / "flight_recorder"
    folder.mkdir(exist_ok=True)
    # Underscored since torch 2.5 and documented in PyTorch's flight recorder tutorial.
    (folder / f"rank_{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())


def straggler_report(seconds: dict[str, float], steps: int) -> str | None:
    """One line on the slowest rank of each phase, from every rank's `Progress.take_seconds`; a collective.

    The time in a phase with collectives includes waiting for others; a phase without (``data``) shows who is slow.
    """
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    parts = []
    for phase in ("data", "forward and backward", "update", "report"):
        times = sorted((own.get(phase, 0.0) / steps, rank) for rank, own in enumerate(everyone))
        slowest, rank = times[-1]
        median = statistics.median(taken for taken, _ in times)
        parts.append(f"{phase} rank {rank} {slowest:.4f} s (median {median:.4f})")
    return f"slowest ranks of the last {steps} steps, seconds a step: " + ", ".join(parts)
