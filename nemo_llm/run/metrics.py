"""What a run reports of itself: the rows of ``metrics.jsonl`` and the progress line.

The rows' fields are a contract with whatever reads the file. Numbers are written in Python's shortest form that reads
back to the same double, so that two runs can be compared bit by bit.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm.log import get_logger
from nemo_llm.report.text import duration
from nemo_llm.run.throughput import Throughput
from nemo_llm.storage.atomic_files import write_atomic

METRICS_FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """One logged training step.

    Attributes:
        step: number of the update, from 1 over the whole run, resumes included.
        loss: mean per learned token of the global batch, in nats.
        grad_norm: norm of the whole gradient before clipping; None when it was not computed.
        learning_rate: rate this update was made with.
        consumed_samples: samples read since the run began, this step's included.
        consumed_tokens: the same in tokens: every position of those samples, padding and prompts included.
        learned_tokens: of this step, those with a loss; where a text gets classes or a score, one a text.
        step_time_seconds: mean time of the steps since the row before.
        tokens_per_second: positions over all devices.
        learned_tokens_per_second: the same of learned tokens.
        tflops_per_device: model TFLOP/s of one device in the causal convention (half of the attention matrix).
        skipped: True when the update was not applied, for gradients that are not finite.
    """

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    consumed_samples: int
    consumed_tokens: int
    learned_tokens: int
    step_time_seconds: float
    tokens_per_second: float
    learned_tokens_per_second: float
    tflops_per_device: float
    skipped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRow:
    """One validation of one named set, after update number `step`.

    Attributes:
        step: number of the last update before it.
        val_loss: mean per token in nats.
        val_accuracy: fraction of tokens whose most probable prediction was right; None where nothing is right or wrong.
        val_name: name of the set in ``data.validation``.
    """

    step: int
    val_loss: float
    val_accuracy: float | None
    val_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One figure of a task or a text, after update number `step`."""

    step: int
    eval_name: str
    eval_value: float


class MetricsFile:
    """``metrics.jsonl`` of a run folder: one JSON object a line. Made on the first rank alone."""

    def __init__(self, run_dir: Path):
        """Open the file for appending; a last line torn by a killed process is cut off first."""
        self.path = run_dir / METRICS_FILE_NAME
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: StepRow | ValidationRow | EvaluationRow, figures: dict[str, float] | None = None) -> None:
        """Write `row` and the task's `figures`, and hand them to the operating system: a killed process loses nothing.

        Numbers that JSON does not have (NaN, infinities) are written as null.
        """
        self._file.write(_encode(dataclasses.asdict(row) | (figures or {})) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until every row is on the disk. Call it before a checkpoint is declared complete."""
        os.fsync(self._file.fileno())

    def drop_rows_beyond(self, step: int) -> int:
        """Drop rows of later steps than `step`, atomically; returns how many. For a resume, before the first append."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            self._file.close()
            write_atomic(self.path, "".join(kept))
            self._file = self.path.open("a", encoding="utf-8")
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; appending is over."""
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of a run folder's ``metrics.jsonl`` in order, also of a run that is going on; without a file, none."""
    path = run_dir / METRICS_FILE_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not yet a whole row
    return [json.loads(line) for line in lines]


def progress_line(
    row: StepRow, throughput: Throughput, *, total_steps: int, val_loss: float | None, memory_gib: float | None
) -> str:
    """One line for the terminal: where the run stands and how fast it goes.

    Args:
        row: the step just logged.
        throughput: speed over the steps since the last line.
        total_steps: ``trainer.max_steps``.
        val_loss: of the latest validation; None before the first.
        memory_gib: peak memory of this rank's device, or of its process on CPU.
    """
    learned = throughput.learned_tokens_per_second
    parts = [
        f"step {row.step:>{len(str(total_steps))}}/{total_steps}",
        f"loss {row.loss:.4f}",
        None if val_loss is None else f"val {val_loss:.4f}",
        None if row.grad_norm is None else f"grad norm {row.grad_norm:.3f}",
        f"lr {row.learning_rate:.2e}",
        f"{_short(throughput.tokens_per_second)} tokens/s ({_short(throughput.tokens_per_second_per_device)}/device)",
        None if learned == throughput.tokens_per_second else f"{_short(learned)} learned tokens/s",
        f"{throughput.tflops_per_device:.3g} TFLOP/s",
        _mfu(throughput),
        None if memory_gib is None else f"{memory_gib:.1f} GiB",
        f"data wait {throughput.data_wait_fraction:.1%}",
        None if throughput.eta_seconds is None else f"ETA {duration(throughput.eta_seconds)}",
    ]
    line = " | ".join(part for part in parts if part is not None)
    marks = [mark for mark, on in ((" (warm-up)", throughput.warm_up), (" (update skipped)", row.skipped)) if on]
    return line + "".join(marks)


def _mfu(throughput: Throughput) -> str | None:
    if throughput.peak is None:
        return None
    causal, full = throughput.mfu_causal, throughput.mfu_full
    return f"MFU {causal:.1%} causal, {full:.1%} full, of {throughput.peak.name} {throughput.peak.tflops:g} TFLOP/s"


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 1000 * size else f"{number / size:.0f}{letter}"
    return f"{number:.3g}"


def _encode(values: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(finite, allow_nan=False)


def _step_of(line: str) -> float:
    """Step of a row; infinite for a damaged line, which is thereby dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        get_logger(__name__).warning("dropped a damaged line of %s: %.80r", METRICS_FILE_NAME, line)
        return math.inf


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            get_logger(__name__).warning("cut off the torn last line of %s (%d bytes)", path, len(content) - whole)
            file.truncate(whole)
