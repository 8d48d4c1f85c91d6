"""Losses that are not finite: skipped, diagnosed by running the step again, recorded with documents, rolled back."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.errors import ConfigError
from nemo_llm.training.bad_steps import find_reason
from tests.parity.layouts import model_overrides
from tests.ranks import RankPool
from tests.training.test_resume import ZERO1


def _train(overrides: tuple[str, ...], folder: str, bad_step: int | None, times: int) -> dict:
    """Five steps; the loss of ``bad_step`` is NaN the first ``times`` times that it is computed."""
    import torch
    import torch.distributed as dist

    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import save_checkpoint
    from nemo_llm.training.rollback import BadSteps
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose([*model_overrides("gpt_tiny"), "trainer.accelerator=cpu", *overrides])
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = Path(folder)
    if dist.get_rank() == 0:
        write_config(run.run_dir, to_plain(cfg))
    left = times
    forward_step, forward_backward = run.task.forward_step, run.forward_backward

    def poisoned(data, model):
        output, loss_function = forward_step(data, model)
        if bad_step is not None and run.state.consumed_samples == (bad_step - 1) * 8 and left > 0:
            output = output + torch.tensor(float("nan"))  # as the fused loss wants it: no factor
        return output, loss_function

    def counted(*args, **kwargs):
        nonlocal left
        outputs = forward_backward(*args, **kwargs)
        if bad_step is not None and run.state.consumed_samples == (bad_step - 1) * 8:
            left -= 1
        return outputs

    run.task.forward_step, run.forward_backward = poisoned, counted
    policy = BadSteps(run)
    rows = []
    for _ in range(5):
        result = train_step(run)
        rows.append((result.loss, result.skipped))
        policy.after(result)
        if run.state.step == 1:
            save_checkpoint(run)
    return {"rows": rows, "step": run.state.step, "samples": run.state.consumed_samples}


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_bad_batch_is_skipped_and_its_documents_recorded(world: int, ranks: RankPool, tmp_path: Path) -> None:
    result = ranks.run(_train, world, (ZERO1,), str(tmp_path), 2, 99)[0]
    assert [skipped for _, skipped in result["rows"]] == [False, True, False, False, False]
    assert all(math.isfinite(loss) for loss, skipped in result["rows"] if not skipped)
    assert result["samples"] == 5 * 8  # never tried again
    (row,) = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert (row["step"], row["first_sample"], row["last_sample"]) == (2, 8, 15)
    assert row["diagnosis"].startswith("data or model")
    assert {document[0] for document in row["documents"]} == set(range(8, 16))


def test_a_value_that_does_not_come_again_is_called_hardware_and_loses_nothing(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = ranks.run(_train, 2, (ZERO1,), str(tmp_path / "a"), None, 0)[0]
    disturbed = ranks.run(_train, 2, (ZERO1,), str(tmp_path / "b"), 3, 1)[0]
    assert disturbed == whole
    assert "hardware, transient" in (tmp_path / "b/bad_steps.jsonl").read_text()


def test_rollback_goes_on_behind_the_bad_batch(ranks: RankPool, tmp_path: Path) -> None:
    overrides = (ZERO1, "trainer.bad_step_policy=rollback")
    result = ranks.run(_train, 1, overrides, str(tmp_path), 3, 99)[0]
    assert result["step"] == 1 + 2  # five steps: three, back to 1, two more
    assert result["samples"] == 5 * 8


@pytest.mark.slow
def test_policy_stop_and_too_many_bad_steps_end_the_run(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="bad_step_policy=stop"):
        ranks.run(_train, 1, ("trainer.bad_step_policy=stop",), str(tmp_path), 2, 99)
    with pytest.raises(AssertionError, match=r"last 1 steps were bad \(trainer.max_bad_steps\)"):
        ranks.run(_train, 1, ("trainer.max_bad_steps=1",), str(tmp_path), 2, 99)


@pytest.mark.parametrize(
    ("loss", "norm", "found"),
    [
        (2.0, 1.0, None),
        (2.1, 1.0, None),
        (3.0, 1.0, "loss 3 is"),
        (2.0, 9.0, "gradient norm 9 is"),
        (float("inf"), 1.0, "loss is inf"),
        (2.0, float("nan"), "gradient norm is nan"),
        (2.0, None, None),
    ],
)
def test_spikes_are_told_by_medians(loss: float, norm: float | None, found: str | None) -> None:
    recent = [(step, 2.0 + 0.02 * (step % 3), 1.0 + 0.05 * (step % 4)) for step in range(40)]
    recent[7] = (7, 50.0, 50.0)  # an earlier spike does not hide the next one
    trainer = SimpleNamespace(spike_sigmas=6.0)
    run = SimpleNamespace(cfg=SimpleNamespace(trainer=trainer), state=SimpleNamespace(recent=recent))
    reason = find_reason(run, loss, norm)
    assert reason is None if found is None else reason is not None and found in reason


def test_a_window_too_short_for_any_spike_is_refused() -> None:
    with pytest.raises(ConfigError, match="spike_window = 19 is shorter than the 20 steps"):
        compose(["+model=gpt_tiny", "trainer.spike_sigmas=6", "trainer.spike_window=19"])
    compose(["+model=gpt_tiny", "trainer.spike_sigmas=6", "trainer.spike_window=20"])
    compose(["+model=gpt_tiny", "trainer.spike_window=8"])
