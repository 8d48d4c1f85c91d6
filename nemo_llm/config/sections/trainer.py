"""The `run` and `trainer` sections: what the run is called, how long it goes and on what."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.fields import NonEmptyStr, NonNegativeInt, PathStr, PositiveFloat, PositiveInt, Section

FEWEST_SPIKE_STEPS = 20
"""Good steps before one is called a spike: a median of fewer says little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection(Section):
    """Name and folder of the run; a `dir` of None means a new folder ``runs/<name>-<timestamp>-<suffix>``."""

    name: NonEmptyStr
    dir: PathStr | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RampupBatchSize(Section):
    """Batch-size ramp: from `start_global_batch_size` in steps of `increment`, over the first `ramp_samples`."""

    start_global_batch_size: PositiveInt
    increment: PositiveInt
    ramp_samples: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig(Section):
    """Length, batch, intervals and devices of a run. Intervals are in steps."""

    max_steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    rampup_batch_size: RampupBatchSize | None
    seed: NonNegativeInt
    deterministic: bool
    val_interval: PositiveInt | None
    val_steps: PositiveInt
    log_interval: PositiveInt
    warmup_log_steps: NonNegativeInt
    check_only: bool
    accelerator: Literal["auto", "cpu", "cuda"]
    devices: PositiveInt | None
    num_nodes: PositiveInt | None
    max_time_minutes: PositiveFloat | None
    first_step_timeout_minutes: PositiveFloat
    step_timeout_minutes: PositiveFloat
    stop_deadline_minutes: PositiveFloat | None
    straggler_interval: PositiveInt | None
    bad_step_policy: Literal["skip", "rollback", "stop"]
    max_bad_steps: PositiveInt
    spike_sigmas: PositiveFloat | None
    spike_window: PositiveInt
    check_memory: bool
    """Whether a run that needs more memory than its GPUs have is refused before anything is built."""

    def __post_init__(self) -> None:
        if self.spike_sigmas is not None and self.spike_window < FEWEST_SPIKE_STEPS:
            raise ValueError(
                f"spike_window = {self.spike_window} is shorter than the {FEWEST_SPIKE_STEPS} steps that a median "
                "needs: no spike would be found; set it to 20 or more, or spike_sigmas to null"
            )
