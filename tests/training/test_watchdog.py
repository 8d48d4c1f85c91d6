"""A rank that stops moving: found over gloo by real processes, named with step, phase and stack, ended on all ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.resilience.phase import RunProgress, StepPhase
from nemo_llm.resilience.watchdog import RankState, Watchdog, name_late_rank, straggler_report, time_limits
from tests.ranks import RankPool
from tests.test_architecture import ROOT

SCRIPT = """
import os, sys, time
from nemo_llm.config.commands.entry import run_entry_point
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


FROZEN = """
import os, sys, time
import torch, torch.distributed as dist
from nemo_llm.config.compose.load import compose
from nemo_llm.resilience.phase import StepPhase, RunProgress
from nemo_llm.resilience.stop_signals import StopSignals
from nemo_llm.resilience.watchdog import Watchdog

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), __import__("pathlib").Path(sys.argv[1])
cfg = compose(["+model=gpt_tiny", "trainer.step_timeout_minutes=0.05", "trainer.first_step_timeout_minutes=0.2"])
progress = RunProgress()
with StopSignals(None, None) as signals, Watchdog(progress, folder, cfg, signals):
    for step in range(1, 1000):
        progress.enter(StepPhase.DATA, step)
        if step == 20:
            (folder / f"pid_{rank}.tmp").write_text(str(os.getpid()))
            (folder / f"pid_{rank}.tmp").rename(folder / f"pid_{rank}")
        if step == 20 and rank == int(sys.argv[2]):
            os.kill(os.getpid(), 19)
        progress.enter(StepPhase.FORWARD_BACKWARD)
        dist.all_reduce(torch.ones(4))
        time.sleep(0.02)
"""


def _start_frozen(folder: Path, rank: int, prefix: list[str], **environment: str) -> subprocess.Popen:
    script = folder / "frozen.py"
    script.write_text(FROZEN)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *prefix, str(script), str(folder), str(rank)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_whichever_rank_freezes_the_others_name_it_and_end(tmp_path: Path, frozen: int) -> None:
    """Rank 0 holds the store, which then answers nobody. Continued, the frozen rank names no other than itself."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "3"}
    processes = [_start_frozen(tmp_path, frozen, [], RANK=str(rank), **meeting) for rank in range(3)]
    living = [rank for rank in range(3) if rank != frozen]
    try:
        outputs = {rank: processes[rank].communicate(timeout=90)[0] for rank in living}
        assert {rank: processes[rank].returncode for rank in living} == dict.fromkeys(living, 76), outputs
        said = re.findall(r"hang: rank (\d+) gives no sign of life", "".join(outputs.values()))
        assert said, outputs
        assert set(said) == {str(frozen)}
        told = json.loads((tmp_path / "exit.json").read_text())
        assert told["code"] == 76
        assert f"rank {frozen} gives no sign" in told["reason"]
        processes[frozen].send_signal(signal.SIGCONT)
        output = processes[frozen].communicate(timeout=60)[0]
        assert processes[frozen].returncode in (1, 76)
        assert f"hang: rank {living[0]}" not in output
        assert f"hang: rank {living[1]}" not in output
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_frozen_rank_0_under_torchrun_is_named(tmp_path: Path) -> None:
    """There the agent holds the store."""
    prefix = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = _start_frozen(tmp_path, 0, prefix)
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "exit.json").exists():
            assert time.monotonic() < until
            time.sleep(0.2)
        assert "hang: rank 0 gives no sign of life" in json.loads((tmp_path / "exit.json").read_text())["reason"]
        os.kill(int((tmp_path / "pid_0").read_text()), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert "exitcode  : 76" in output or "exitcode: 76" in output, output
    finally:
        process.kill()


LONG = """
import sys, time
from pathlib import Path
from nemo_llm.config.compose.load import compose
import torch.distributed as dist
from nemo_llm.resilience.phase import StepPhase, RunProgress
from nemo_llm.resilience.stop_signals import StopSignals
from nemo_llm.resilience.watchdog import Watchdog

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1] + "/store", 1), rank=0, world_size=1)
limits = ["trainer.step_timeout_minutes=0.02", "evaluation.timeout_minutes=" + sys.argv[2]]
progress = RunProgress()
cfg = compose(["+model=gpt_tiny", *limits])
with StopSignals(None, None) as signals, Watchdog(progress, Path(sys.argv[1]), cfg, signals):
    progress.enter(StepPhase[sys.argv[3]], 1)
    time.sleep(4)
print("ended")
"""


@pytest.mark.parametrize(
    ("phase", "minutes", "code"), [("EVALUATION", "1", 0), ("EVALUATION", "0.02", 76), ("UPDATE", "1", 76)]
)
def test_an_evaluation_has_a_limit_of_its_own(tmp_path: Path, phase: str, minutes: str, code: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LONG, str(tmp_path), minutes, phase]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("ended" in done.stdout) == (code == 0)
    if code:
        assert f"it is in phase {StepPhase[phase].value!r}" in done.stderr


def test_every_phase_has_a_limit_and_an_order() -> None:
    limits = time_limits(compose(["+model=gpt_tiny"]))
    assert limits.keys() == set(StepPhase)
    assert all(seconds > 0 for seconds in limits.values())
    states = [RankState(rank, 1, phase.value, 9.0, ()) for rank, phase in enumerate(StepPhase)]
    assert "rank 0 is late" in name_late_rank(states, len(states), 9.0)


class _BrokenSignals:
    @property
    def reason(self) -> None:
        raise OSError("no such disk")


def _watch_with_an_error(folder: str) -> bool:
    """Whether the thread still watches after an error in it."""
    cfg = compose(["+model=gpt_tiny", "trainer.step_timeout_minutes=0.02"])
    signals: Any = _BrokenSignals()
    with Watchdog(RunProgress(), Path(folder), cfg, signals) as watchdog:
        time.sleep(0.5)
        return watchdog._thread.is_alive()


def test_an_error_in_the_watchdog_does_not_end_it(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(_watch_with_an_error, 1, str(tmp_path)) == [True]


def _slow_data_on_rank_2() -> str | None:
    rank = int(os.environ["RANK"])
    progress = RunProgress()
    for step in range(2):
        progress.enter(StepPhase.DATA, step)
        time.sleep(0.5 if rank == 2 else 0.0)
        progress.enter(StepPhase.UPDATE)
        time.sleep(0.25 if rank == 1 else 0.0)
    progress.enter(StepPhase.REPORT)
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
        RankState(1, 5, "forward and backward", 9.0, ("nemo_llm/models/layers/attention.py:1 in forward",)),
        RankState(2, 5, "update", 9.0, (waits,)),
    ]
    assert "rank 1 is late" in name_late_rank(states, 3, 9.0)
    assert "rank 3 gives no sign of life" in name_late_rank(states, 4, 9.0)
