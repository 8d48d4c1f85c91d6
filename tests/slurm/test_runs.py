"""``python -m nemo_llm.runs``: what a list of runs says of each."""

import json
import subprocess
import sys
from pathlib import Path

from nemo_llm.errors import ExitCode
from nemo_llm.run.folder import open_run_dir, write_exit
from nemo_llm.run.metrics import MetricsFile, StepRow
from nemo_llm.runs import find_runs, main, read_run
from tests.test_architecture import ROOT


def make_run(folder: Path, step: int):
    """A run folder as training writes it, and the lock that it holds."""
    from nemo_llm.config.compose.load import compose

    opened = open_run_dir(compose(["+model=gpt_tiny", f"run.dir={folder}", "trainer.max_steps=50"]))
    metrics = MetricsFile(folder)
    row = StepRow(
        step=step, loss=2.5, grad_norm=1.0, learning_rate=1e-3, consumed_samples=1, consumed_tokens=64,
        learned_tokens=64, step_time_seconds=2.0, tokens_per_second=32.0, learned_tokens_per_second=32.0,
        tflops_per_device=0.1, skipped=False,
    )  # fmt: skip
    metrics.append(row)
    metrics.close()
    return opened


def test_a_run_that_lives_shows_its_step_and_the_time_left(tmp_path: Path) -> None:
    with make_run(tmp_path / "a", 20):
        status = read_run(tmp_path / "a", {})
    assert (status.state, status.step, status.max_steps, status.loss) == ("running", 20, 50, 2.5)
    assert status.seconds_left == 60.0
    assert status.cells()[2:6] == ("20/50", "2.5000", "32", "1m 00s")


def test_an_ended_run_says_how_and_why(tmp_path: Path) -> None:
    with make_run(tmp_path / "a", 20):
        write_exit(tmp_path / "a", ExitCode.HANG, "rank 1 is late", 20)
    status = read_run(tmp_path / "a", {})
    assert (status.state, status.why, status.seconds_left) == ("hang", "rank 1 is late", None)


def test_a_job_that_waits_again_is_queued(tmp_path: Path) -> None:
    with make_run(tmp_path / "a", 20):
        write_exit(tmp_path / "a", ExitCode.PREEMPTED, "SIGUSR1", 20)
    for restart in (0, 1):
        (tmp_path / f"a/slurm/7.{restart}.1").mkdir(parents=True)
        (tmp_path / f"a/slurm/7.{restart}.1/rank_0000.host").write_text("node1\n")
    status = read_run(tmp_path / "a", {"7": "PENDING"})
    assert (status.state, status.starts, status.job) == ("queued", 2, "7")


def test_the_command_lists_the_runs_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with make_run(tmp_path / name, 3):
            write_exit(tmp_path / name, ExitCode.DONE, "trainer.max_steps = 50 reached", 3)
    (tmp_path / "other").mkdir()
    assert {path.name for path in find_runs([tmp_path])} == {"a", "b"}
    command = [sys.executable, "-m", "nemo_llm.runs", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert {json.loads(line)["state"] for line in done.stdout.splitlines()} == {"done"}


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_checkpoint_of_weights_alone_is_no_run(tmp_path: Path) -> None:
    for name in ("run", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "merged" / "COMPLETE").touch()
    assert find_runs([tmp_path]) == [tmp_path / "run"]
