"""Steps whose update would do harm: seen before weights change, run again to tell hardware from data, and recorded.

A step is bad when its loss or gradient norm is not finite, or lies far above those of the last good steps: more than
``trainer.spike_sigmas`` robust standard deviations above the median (median absolute deviation times 1.4826, which
earlier spikes do not move). The batch of a bad step is never tried again in the course of training.
"""

import json
import math
from dataclasses import dataclass
from statistics import median

from nemo_llm.config.sections.trainer import FEWEST_SPIKE_STEPS
from nemo_llm.data.sampling.blended_source import BlendedSource
from nemo_llm.data.sampling.sample_provenance import ledger
from nemo_llm.log import get_logger
from nemo_llm.training.state import TrainingRun

_log = get_logger(__name__)

BAD_STEPS_FILE_NAME = "bad_steps.jsonl"
_SIGMA_OF_MAD = 1.4826
_RELATIVE_FLOOR = 0.01
_MAX_DOCUMENTS = 1000


@dataclass(frozen=True)
class BadStep:
    """Why a step's update was not made.

    Attributes:
        reason: one phrase with the values.
        diagnosis: what running the step again showed.
    """

    reason: str
    diagnosis: str


def find_reason(run: TrainingRun, loss: float, grad_norm: float | None) -> str | None:
    """Why this step is bad, or None. A missing norm (an fp16 overflow, which the loss scaler handles) is not."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            return f"{name} is {value}"
    sigmas = run.cfg.trainer.spike_sigmas
    recent = run.state.recent
    if sigmas is None or len(recent) < FEWEST_SPIKE_STEPS:
        return None
    for column, (name, value) in enumerate((("loss", loss), ("gradient norm", grad_norm)), start=1):
        if value is None:
            continue
        values = [row[column] for row in recent]
        middle = median(values)
        # A floor: where the last steps hardly differ, the deviation alone would call anything a spike.
        sigma = max(_SIGMA_OF_MAD * median(abs(v - middle) for v in values), _RELATIVE_FLOOR * abs(middle))
        if value > middle + sigmas * sigma:
            return (
                f"{name} {value:.4g} is {(value - middle) / sigma:.1f} robust deviations above the median {middle:.4g} "
                f"of the last {len(values)} steps (trainer.spike_sigmas={sigmas:g})"
            )
    return None


def remember(run: TrainingRun, loss: float, grad_norm: float | None) -> None:
    """Add a good step to those that spikes are told by."""
    run.state.recent.append((run.state.step, loss, float(grad_norm or 0.0)))
    del run.state.recent[: -run.cfg.trainer.spike_window]


def diagnose(first: tuple[float, float | None], second: tuple[float, float | None], second_reason: str | None) -> str:
    """What running a bad step again says, from (loss, norm) of both."""
    same = all(
        a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))
        for a, b in zip(first, second, strict=True)
    )
    if same:
        return "data or model: run again, the step gave the same values bit by bit"
    if second_reason is None:
        return f"hardware, transient: run again, the step gave {second}, which is good"
    return f"not reproducible: run again, the step gave {second}, also bad; hardware or kernels that do not repeat"


def record(run: TrainingRun, bad: BadStep, values: tuple[float, float | None], samples: tuple[int, int]) -> None:
    """Append to ``bad_steps.jsonl`` what happened and which documents were in the batch; on the first rank."""
    policy = run.cfg.trainer.bad_step_policy
    step = run.state.step + 1
    if not run.runtime.is_first_rank:
        return
    source = run.data.train
    documents = []
    if isinstance(source, BlendedSource):
        documents = [
            [entry.sample, entry.source, entry.place, entry.first_document, entry.last_document]
            for entry in ledger(source, *samples)
        ][:_MAX_DOCUMENTS]
    row = {
        "step": step,
        "reason": bad.reason,
        "diagnosis": bad.diagnosis,
        "policy": policy,
        "loss": repr(values[0]),
        "grad_norm": repr(values[1]),
        "first_sample": samples[0],
        "last_sample": samples[1] - 1,
        "documents": documents,
    }
    with (run.run_dir / BAD_STEPS_FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    _log.warning(
        "step %d is bad: %s; %s; policy %s; samples %d to %d", step, bad.reason, bad.diagnosis, policy, *samples
    )
