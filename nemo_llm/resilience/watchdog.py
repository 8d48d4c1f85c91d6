"""Hangs: seen by a thread of every rank, told in one sentence that names the late rank, ended on all ranks.

Ranks tell each other where they are through the key-value store that they met at, which needs no collective and works
over gloo and NCCL alike. A rank whose main thread has not moved on for the time limit asks for everybody's state; the
lowest rank that still answers says who is late: who stood still itself, who does not answer at all, else who is
furthest behind, else who is not waiting for others. Where the store does not answer, every rank names its holder.
"""

import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from nemo_llm.config import RunConfig
from nemo_llm.errors import ExitCode
from nemo_llm.resilience.phase import RunProgress, StepPhase
from nemo_llm.resilience.stop_signals import StopSignals
from nemo_llm.run.folder import write_exit

# The watchdog speaks before the collectives' own time limit ends ranks with a traceback each.
_SHARE_OF_LIMIT = 0.9
_FRAMES = 4
_DELAY_SECONDS = 2.0
"""A thread that is woken later than this was not only waiting for a busy processor."""
_END_SECONDS = 30.0
"""The longest time from the end's beginning to the process's end."""


@dataclass(frozen=True)
class RankState:
    """What a rank says of itself when a hang is suspected."""

    rank: int
    step: int
    phase: str
    seconds: float
    stack: tuple[str, ...]
    stood_still: float = 0.0
    """Seconds of this phase in which none of its threads ran, as after SIGSTOP."""

    @property
    def waits_for_others(self) -> bool:
        """Whether the innermost frame is in a collective."""
        return "torch/distributed" in self.stack[0] if self.stack else False


def name_late_rank(states: Sequence[RankState], world_size: int, limit_seconds: float) -> str:
    """One sentence on who is late, from the states of the ranks that answered."""
    frozen = max(states, key=lambda state: state.stood_still)
    if frozen.stood_still:
        return (
            f"hang: rank {frozen.rank} itself stood still for {frozen.stood_still:.0f} s (stopped, or without a "
            f"processor) after step {frozen.step}, in phase {frozen.phase!r}"
        )
    silent = sorted(set(range(world_size)) - {state.rank for state in states})
    if silent:
        ranks = ", ".join(map(str, silent))
        return f"hang: rank {ranks} gives no sign of life; the others wait for it since {limit_seconds:.0f} s"
    behind = min(states, key=lambda s: (s.step, StepPhase(s.phase).order, s.waits_for_others, -s.seconds))
    return f"hang: rank {behind.rank} is late: {_where(behind)}"


def _where(state: RankState) -> str:
    place = " < ".join(state.stack)
    return f"after step {state.step} it is in phase {state.phase!r} for {state.seconds:.0f} s, at {place}"


def _store_is_gone(own: RankState) -> str:
    """The sentence of a rank that can ask nobody: who holds the store gives no sign of life."""
    if own.stood_still:
        return name_late_rank([own], own.rank + 1, 0.0)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holder = "torchrun's agent on the first node" if agent else "rank 0"
    return (
        f"hang: {holder} gives no sign of life: it holds the store that the ranks met at, which does not answer; "
        f"rank {own.rank} waits: {_where(own)}"
    )


def time_limits(cfg: RunConfig) -> dict[StepPhase, float]:
    """Seconds that a rank may stay in each phase."""
    trainer = cfg.trainer
    minutes = dict.fromkeys(StepPhase, trainer.step_timeout_minutes)
    for slow in (StepPhase.START, StepPhase.VALIDATION, StepPhase.SAVE, StepPhase.END):
        minutes[slow] = trainer.first_step_timeout_minutes
    minutes[StepPhase.EVALUATION] = cfg.evaluation.timeout_minutes
    return {phase: 60 * limit * _SHARE_OF_LIMIT for phase, limit in minutes.items()}


class _Store:
    """The key-value store that the ranks met at, with a time limit for each call.

    A call to a store whose holder is frozen never returns, and PyTorch has no limit for it: every call is made by a
    thread of its own, which is left behind when it does not return.
    """

    def __init__(self) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._pending: SimpleQueue | None = None

    def call(self, name: str, *arguments: Any, seconds: float) -> Any:
        """The result of a method of PyTorch's store.

        Raises:
            TimeoutError: it, or the call before it, does not return.
            RuntimeError: the store is gone: whoever held it has ended.
        """
        try:
            if self._pending is not None:
                self._pending.get(timeout=seconds)
            answers: SimpleQueue = SimpleQueue()
            self._pending = answers
            threading.Thread(target=self._answer, args=(answers, name, arguments), daemon=True).start()
            result, error = answers.get(timeout=seconds)
        except Empty:
            raise TimeoutError(f"the store did not answer {name} for {seconds:.1f} s") from None
        self._pending = None
        if error is not None:
            raise error
        return result

    def _answer(self, answers: SimpleQueue, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            answers.put((getattr(self._store, name)(*arguments), None))
        except Exception as error:
            answers.put((None, error))


class Watchdog:
    """Context manager around the training loop; ends the process with `ExitCode.HANG` when no rank moves on.

    Whatever it waits for has a limit of its own, and an error in it never ends it without a word.

    Args:
        progress: of this rank.
        run_dir: where the first words are left, with the flight recorder's dump on CUDA.
        cfg: the time limits of each phase (`time_limits`) and of stopping.
        signals: what tells this rank to stop; it must have done so within ``trainer.stop_deadline_minutes``.
    """

    def __init__(self, progress: RunProgress, run_dir: Path, cfg: RunConfig, signals: StopSignals) -> None:
        self._progress, self._run_dir, self._signals = progress, run_dir, signals
        self._limits = time_limits(cfg)
        self._stop_minutes = cfg.trainer.stop_deadline_minutes
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store = _Store()
        self._first_step = progress.step
        self._main = threading.main_thread()
        self._stop = threading.Event()
        self._interval = min(1.0, min(self._limits.values()) / 10)
        self._patience = 5 * self._interval + 2.0
        self._looked, self._stood_still, self._failed = time.monotonic(), 0.0, False
        self._alarm = f"nemo_llm/hang/{id_of_attempt()}"
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join(_END_SECONDS)
        # A rank that ends for a hang closes its connections, an error in the others: theirs is the hang's code too.
        if kind is not None and issubclass(kind, Exception) and self._alarm_raised():
            self._end(self._limits[self._progress.phase])

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._look()
            except Exception:
                if not self._failed:  # the same every second from here on
                    traceback.print_exc()
                self._failed = True

    def _look(self) -> None:
        self._check_stop_deadline()
        now = time.monotonic()
        if self._progress.since > self._looked:
            self._stood_still = 0.0
        # This process itself was stopped, or had no processor: the others may have moved on, or given it up.
        if now - self._looked > 2 * self._interval + _DELAY_SECONDS:
            self._stood_still += now - self._looked
        self._looked = now
        first = self._progress.step <= self._first_step
        limit = self._limits[StepPhase.START if first else self._progress.phase]
        if now - self._progress.since - self._stood_still > limit or self._alarm_raised():
            self._end(limit)

    def _alarm_raised(self) -> bool:
        try:
            return self._world_size > 1 and self._store.call("check", [self._alarm], seconds=self._interval)
        except (RuntimeError, OSError):  # it does not answer, or is gone: what follows is this rank's own to see
            return False

    def _check_stop_deadline(self) -> None:
        """End where the step in hand and the save take longer than the notice allows; the checkpoint before stays."""
        reason = self._signals.reason
        if reason is None or self._stop_minutes is None or time.time() - reason.unix_time < 60 * self._stop_minutes:
            return
        sentence = (
            f"{reason.detail}: rank {self._rank} could not stop and save within trainer.stop_deadline_minutes = "
            f"{self._stop_minutes:g}; it is in phase {str(self._progress.phase)!r} after step {self._progress.step}. "
            "The last complete checkpoint stays"
        )
        _end_in_any_case(ExitCode.PREEMPTED.of_process())
        print(sentence, file=sys.stderr, flush=True)
        write_exit(self._run_dir, ExitCode.PREEMPTED, sentence, self._progress.step)
        os._exit(ExitCode.PREEMPTED.of_process())

    def _end(self, limit: float) -> None:
        """Say where this rank is, let the lowest live rank speak, and end, whatever happens on the way."""
        _end_in_any_case(ExitCode.HANG)
        try:
            self._speak(limit)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(ExitCode.HANG)

    def _speak(self, limit: float) -> None:
        own = RankState(
            self._rank,
            self._progress.step,
            str(self._progress.phase),
            time.monotonic() - self._progress.since,
            self._stack(),
            self._stood_still,
        )
        try:
            states = [own] if self._world_size == 1 else self._exchange(own)
        except (RuntimeError, OSError):
            states, sentence = [own], _store_is_gone(own)
        else:
            sentence = name_late_rank(states, self._world_size, limit)
        _dump_flight_recorder(self._run_dir, self._rank)
        if own.rank == min(state.rank for state in states):
            print(sentence, file=sys.stderr, flush=True)
            write_exit(self._run_dir, ExitCode.HANG, sentence, own.step)
        else:
            time.sleep(1.0)  # a launcher ends all ranks as soon as one has: the speaker goes first

    def _exchange(self, own: RankState) -> list[RankState]:
        """The states of the ranks that answer.

        Raises:
            RuntimeError, OSError: the store does not answer.
        """
        self._store.call("set", self._alarm, "1", seconds=self._patience)
        self._store.call("set", f"{self._alarm}/{own.rank}", json.dumps(asdict(own)), seconds=self._patience)
        until = time.monotonic() + self._patience
        found: dict[int, RankState] = {own.rank: own}
        while len(found) < self._world_size and time.monotonic() < until:
            for rank in set(range(self._world_size)) - found.keys():
                key = f"{self._alarm}/{rank}"
                if self._store.call("check", [key], seconds=self._patience):
                    content = json.loads(self._store.call("get", key, seconds=self._patience))
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


def _end_in_any_case(code: int) -> None:
    """End the process a little later, should what is done until then not return: a folder may not answer either."""
    deadline = threading.Timer(_END_SECONDS, os._exit, [code])
    deadline.daemon = True
    deadline.start()


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
    """One line on the slowest rank of each phase, from every rank's `RunProgress.take_seconds`; a collective.

    The time in a phase with collectives includes waiting for others; a phase without (``data``) shows who is slow.
    """
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    parts = []
    for phase in (StepPhase.DATA, StepPhase.FORWARD_BACKWARD, StepPhase.UPDATE, StepPhase.REPORT):
        times = sorted((own.get(phase, 0.0) / steps, rank) for rank, own in enumerate(everyone))
        slowest, rank = times[-1]
        median = statistics.median(taken for taken, _ in times)
        parts.append(f"{phase} rank {rank} {slowest:.4f} s (median {median:.4f})")
    return f"slowest ranks of the last {steps} steps, seconds a step: " + ", ".join(parts)
