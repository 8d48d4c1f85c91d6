"""A rank that stops moving: found over gloo by real processes, named with step, phase and stack, ended on all ranks."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_llm.training.progress import Progress
from nemo_llm.training.watchdog import RankState, name_late_rank, straggler_report
from tests.ranks import RankPool

SCRIPT = """
import os, sys, time
from nemo_llm.config.entry import run_entry_point
from nemo_llm.training import setup

def main(cfg):
    from nemo_llm.train import main as train
    build = setup.build_training_run
    def build_slow(cfg, runtime):
        run = build(cfg, runtime)
        micro_batches = run.loader.micro_batches
        def late_batches(first, count):
            if runtime.rank == 1 and run.state.step == 2:
                {late}
            return micro_batches(first, count)
        run.loader.micro_batches = late_batches
        return run
    setup.build_training_run = build_slow
    return train(cfg)

sys.exit(run_entry_point(main, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ("time.sleep(1000)", "rank 1 is late: after step 2 it is in phase 'data' for"),
        # SIGSTOP: not even its threads run
        pytest.param("os.kill(os.getpid(), 19)", "rank 1 gives no sign of life", marks=pytest.mark.slow),
    ],
    ids=["sleeps", "frozen"],
)
def test_a_late_rank_is_named_and_all_ranks_end(late: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(SCRIPT.format(late=late))
    options = [
        "+model=gpt_tiny", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_layers=2",
        "data.seq_length=64", "trainer.global_batch_size=2", "trainer.micro_batch_size=1", "trainer.accelerator=cpu",
        "trainer.step_timeout_minutes=0.06", f"run.dir={tmp_path}/run", "trainer.log_interval=1",
        "checkpoint.save_interval=null", "exp_manager.enabled=false",
    ]  # fmt: skip
    root = str(Path(__file__).resolve().parent.parent.parent)
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(script), *options],
                env={**os.environ, "PYTHONPATH": root, **place, **meeting},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    output = processes[0].communicate(timeout=100)[0]
    frozen = "19" in late
    if frozen:
        processes[1].kill()
    codes = [processes[0].returncode, processes[1].wait(timeout=30)]
    assert codes == [76, -9 if frozen else 76], output
    assert said in output
    if not frozen:
        assert "late.py" in output
        assert "late_batches" in output
    assert json.loads((tmp_path / "run/exit.json").read_text())["meaning"] == "hang"


def test_a_step_that_outlasts_the_notice_ends_at_the_deadline(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    late = "print('late', flush=True); time.sleep(1000)"
    script.write_text(SCRIPT.format(late=late).replace("rank == 1", "rank == 0"))
    options = [
        "+model=gpt_tiny", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_layers=2",
        "data.seq_length=64", "trainer.global_batch_size=2", "trainer.micro_batch_size=1", "trainer.accelerator=cpu",
        f"run.dir={tmp_path}/run", "trainer.stop_deadline_minutes=0.02", "exp_manager.enabled=false",
        "checkpoint.save_interval=1", "trainer.log_interval=1",
    ]  # fmt: skip
    root = str(Path(__file__).resolve().parent.parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), *options],
        env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "late" not in (line := process.stdout.readline()):
        assert line, "ended early"
    process.terminate()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 75, output
    assert "could not stop and save within trainer.stop_deadline_minutes = 0.02" in output
    assert (tmp_path / "run/checkpoints/step_00000002/COMPLETE").exists()


def _slow_data_on_rank_2() -> str | None:
    rank = int(os.environ["RANK"])
    progress = Progress()
    for step in range(2):
        progress.enter("data", step)
        time.sleep(0.5 if rank == 2 else 0.0)
        progress.enter("update")
        time.sleep(0.25 if rank == 1 else 0.0)
    progress.enter("report")
    return straggler_report(progress.take_seconds(), 2)


def test_the_slowest_rank_of_each_phase_is_told(ranks: RankPool) -> None:
    lines = ranks.run(_slow_data_on_rank_2, 3)
    said = re.fullmatch(
        r"slowest ranks of the last 2 steps, seconds a step: data rank 2 (\S+) s \(median (\S+)\), "
        r"forward and backward rank . 0.0000 s \(median 0.0000\), update rank 1 (\S+) s \(median (\S+)\), report .*",
        lines[0],
    )
    assert said, lines[0]
    assert float(said[1]) >= 0.5 > float(said[2])
    assert float(said[3]) >= 0.25 > float(said[4])
    assert set(lines) == {lines[0]}


def test_the_rank_that_waits_for_nobody_is_late() -> None:
    waits = "torch/distributed/distributed_c10d.py:1 in all_reduce"
    states = [
        RankState(0, 5, "forward and backward", 9.0, (waits,)),
        RankState(1, 5, "forward and backward", 9.0, ("nemo_llm/models/attention.py:1 in forward",)),
        RankState(2, 5, "update", 9.0, (waits,)),
    ]
    assert "rank 1 is late" in name_late_rank(states, 3, 9.0)
    assert "rank 3 gives no sign of life" in name_late_rank(states, 4, 9.0)
