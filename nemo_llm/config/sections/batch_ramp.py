"""Global batch size and consumed samples as pure functions of the step, with or without a batch-size ramp.

The ramp is Megatron's: over the first ``ramp_samples`` samples the global batch grows from
``start_global_batch_size`` to ``trainer.global_batch_size`` in equal shares of samples, one ``increment`` at a time.
Megatron carries the size along as it trains; here the whole ramp is laid out once, so that any step's batch is known
without a history. It does not depend on the parallel layout: a run resumed on other processes sees the same batches.

`step` is the number of an update as `metrics.jsonl` has it (from 1); step 0 is the state before the first update.
"""

from bisect import bisect_right
from dataclasses import dataclass

from nemo_llm.config.sections.trainer import RampupBatchSize
from nemo_llm.errors import InputError


@dataclass(frozen=True, slots=True)
class RampStage:
    """Consecutive steps of one size: those after `steps_before`, of which the run has had `samples_before` samples."""

    steps_before: int
    samples_before: int
    global_batch_size: int


@dataclass(frozen=True, slots=True)
class BatchRamp:
    """Global batch size of every step of a run. Build it with `build_batch_ramp`."""

    stages: tuple[RampStage, ...]

    def global_batch_size(self, step: int) -> int:
        """Samples in update number `step` (from 1)."""
        if step < 1:
            raise ValueError(f"step = {step}: updates are numbered from 1")
        return self._stage_before(step).global_batch_size

    def consumed_samples(self, step: int) -> int:
        """Samples that updates 1 to `step` read together; 0 for step 0."""
        if step < 1:
            return 0
        stage = self._stage_before(step)
        return stage.samples_before + (step - stage.steps_before) * stage.global_batch_size

    def step_of(self, consumed_samples: int) -> int:
        """The step after which exactly `consumed_samples` have been read: the inverse of `consumed_samples`.

        Raises:
            InputError: no step ends there, so that these samples were read with other batch sizes.
        """
        index = bisect_right(self.stages, consumed_samples, key=lambda stage: stage.samples_before) - 1
        if consumed_samples >= 0:
            stage = self.stages[index]
            steps, rest = divmod(consumed_samples - stage.samples_before, stage.global_batch_size)
            if rest == 0:
                return stage.steps_before + steps
        raise InputError(
            f"{consumed_samples} consumed samples are no whole number of steps with the batch sizes configured; "
            "set trainer.global_batch_size and trainer.rampup_batch_size to those of the run that is resumed"
        )

    def _stage_before(self, step: int) -> RampStage:
        return self.stages[bisect_right(self.stages, step - 1, key=lambda stage: stage.steps_before) - 1]


def build_batch_ramp(global_batch_size: int, rampup: RampupBatchSize | None) -> BatchRamp:
    """Lay out the ramp up to `global_batch_size`; without `rampup` every step has that size.

    Raises:
        ValueError: sizes that `checks_recipe.check_batch_ramp` refuses.
    """
    if rampup is None or rampup.start_global_batch_size == global_batch_size:
        return BatchRamp((RampStage(0, 0, global_batch_size),))
    increments, rest = divmod(global_batch_size - rampup.start_global_batch_size, rampup.increment)
    if rest or increments < 0:
        raise ValueError(f"no ramp from {rampup.start_global_batch_size} to {global_batch_size} by {rampup.increment}")
    stages = []
    steps = samples = done = 0
    while done < increments:
        size = rampup.start_global_batch_size + done * rampup.increment
        stages.append(RampStage(steps, samples, size))
        # Increment n is due once n / increments of the ramp's samples are read, in whole numbers: no rounding.
        due = -(-(done + 1) * rampup.ramp_samples // increments)
        more_steps = -(-(due - samples) // size)
        steps += more_steps
        samples += more_steps * size
        done = min(increments, samples * increments // rampup.ramp_samples)  # one long step may skip sizes
    stages.append(RampStage(steps, samples, global_batch_size))
    return BatchRamp(tuple(stages))
