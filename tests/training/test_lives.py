"""Whole programs: stopped by signals, out of room, changed on resume, restarted by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_architecture import ROOT

SMALL = [
    "+model=gpt_tiny", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_layers=2",
    "data.seq_length=64", "trainer.global_batch_size=4", "trainer.micro_batch_size=1", "trainer.accelerator=cpu",
    "trainer.log_interval=1", "trainer.val_interval=null", "trainer.val_steps=1", "exp_manager.enabled=false",
    "sample.enabled=false",
]  # fmt: skip


def start(*options: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    """A training program; its output is piped."""
    command = [*launcher, "-W", "ignore", "-m", "nemo_llm.train", *SMALL, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    path = run_dir / "metrics.jsonl"
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and path.read_text().count('"loss"') >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_a_second_signal_while_saving_spoils_nothing(tmp_path: Path) -> None:
    """SIGUSR1, then SIGTERM twice at once; the run saves, says preempted, and its checkpoint is whole."""
    from nemo_llm.checkpoint.folder import find_checkpoint
    from nemo_llm.checkpoint.manifest import verify

    process = start(f"run.dir={tmp_path}/run", "trainer.max_steps=100000", "checkpoint.save_interval=null")
    wait_for_step(tmp_path / "run", 2, process)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.03)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    ended = json.loads((tmp_path / "run/exit.json").read_text())
    assert (ended["meaning"], ended["reason"]) == ("preempted", "SIGUSR1")
    found = find_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.name == f"step_{ended['step']:08d}"
    assert verify(found) > 0


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_in_the_job(tmp_path: Path) -> None:
    """``--max-restarts``: one rank is killed, all begin anew from the last checkpoint, and the run comes to its end."""
    launcher = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "2", "--no-python", sys.executable)
    process = start(
        f"run.dir={tmp_path}/run", "trainer.max_steps=60", "checkpoint.save_interval=2", launcher=launcher
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 6, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "resumed from" in output
    rows = [
        json.loads(line)["step"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert rows == list(range(1, 61))


def test_a_write_that_fails_half_way_leaves_no_checkpoint_and_says_why(tmp_path: Path) -> None:
    """A limit on file sizes makes the writing fail inside a file, after the look at the free room."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000));"
        "from nemo_llm.train import main; from nemo_llm.config.commands.entry import run_entry_point;"
        "sys.exit(run_entry_point(main, sys.argv[1:]))"
    )
    options = [*SMALL, f"run.dir={tmp_path}/run", "trainer.max_steps=1", "data=mock", "tokenizer=byte"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a checkpoint could not be written: rank 0 could not write its part" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param("trainer.seed=7", "trainer.seed = 7: ", marks=pytest.mark.slow),
        ("data.blend=[{name: other, text: 'asset:moby_dick'}]", "data.blend"),
    ],
)
def test_changes_that_a_resume_may_not_make_are_refused_by_name(change: str, said: str, saved_run: Path) -> None:
    process = start(f"run.dir={saved_run}", "trainer.max_steps=4", change)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2, output
    assert said in output


@pytest.mark.slow
def test_a_later_blend_may_change(saved_run: Path) -> None:
    change = "data.blend_changes=[{from_sample: 12, weights: {shakespeare: 0.1, moby_dick: 0.9}}]"
    process = start(f"run.dir={saved_run}", "trainer.max_steps=4", change, "optim.lr=2e-3")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "changed since the run began: optim.lr" in output
    assert "changed since the run began: data.blend_changes" in output


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    process = start(f"run.dir={folder}", "trainer.max_steps=2")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return folder
