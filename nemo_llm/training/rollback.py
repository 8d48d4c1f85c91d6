"""What follows a bad step: nothing, the last checkpoint, or the end of the run."""

from nemo_llm.checkpoint.folder import find_checkpoints
from nemo_llm.errors import NemoLlmError
from nemo_llm.log import get_logger
from nemo_llm.training.checkpoint import finish_saving, load_checkpoint
from nemo_llm.training.resume import newest_good
from nemo_llm.training.state import StepResult, TrainingRun

_log = get_logger(__name__)


class BadStepsError(NemoLlmError):
    """A run that cannot go on by itself: too many bad steps, or one and the policy to stop."""


class BadSteps:
    """Counts bad steps in a row and applies ``trainer.bad_step_policy``; called by all ranks after each step."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._in_a_row = 0
        self._rollbacks: dict[int, int] = {}

    def after(self, result: StepResult) -> None:
        """Take in a step.

        Raises:
            BadStepsError: the policy is to stop, or ``trainer.max_bad_steps`` is reached.
        """
        run, trainer = self._run, self._run.cfg.trainer
        if result.bad is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        where = f"step {run.state.step} is bad: {result.bad.reason}; {result.bad.diagnosis}"
        if trainer.bad_step_policy == "stop":
            raise BadStepsError(f"{where}. trainer.bad_step_policy=stop; its documents are in bad_steps.jsonl")
        if self._in_a_row >= trainer.max_bad_steps:
            raise BadStepsError(
                f"{where}. The last {self._in_a_row} steps were bad (trainer.max_bad_steps); their documents are in "
                "bad_steps.jsonl.\n      fix: a lower optim.lr, or other data, from a checkpoint before them"
            )
        if trainer.bad_step_policy == "rollback":
            self._roll_back(where)

    def _roll_back(self, where: str) -> None:
        """Weights and optimizer of the last checkpoint; the data goes on behind the bad batch."""
        run = self._run
        finish_saving(run)
        candidates = find_checkpoints(run.run_dir)
        if not candidates:
            _log.warning("no checkpoint to roll back to; the update is left out")
            return
        samples, tokens = run.state.consumed_samples, run.state.consumed_tokens
        found = newest_good(run.cfg, run.runtime, candidates)
        load_checkpoint(run, found)
        step = run.state.step
        self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
        if self._rollbacks[step] >= run.cfg.trainer.max_bad_steps:
            raise BadStepsError(f"{where}. Rolled back to step {step} {self._rollbacks[step]} times already")
        run.state.consumed_samples, run.state.consumed_tokens = samples, tokens
        _log.warning("rolled back to %s; the data goes on at sample %d", found, samples)
