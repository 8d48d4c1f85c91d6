"""Jobs on a real Slurm cluster of emulated nodes: started, refused, stopped, killed, requeued."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.slurm_faults import OPTIONS
from tests.slurm.cluster import Cluster, what_is_missing
from tests.test_architecture import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
]
# A start takes seconds on an idle machine; the rest is room for a busy one.
START_SECONDS = 300


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=4) as cluster:
        yield cluster


def call(cluster: Cluster, *words: str, launcher: tuple[str, ...] = ("bash",)) -> subprocess.CompletedProcess:
    """``bash slurm/pretrain.sh ...``, or another command with the script, as a user of the cluster."""
    environment = cluster.environment | {"NEMO_LLM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def submit(cluster: Cluster, folder: Path, nodes: int, ranks: int, *options: str) -> str:
    done = call(
        cluster, "slurm/pretrain.sh", f"--nodes={nodes}", "--gpus-per-node=0", f"--ntasks-per-node={ranks}",
        f"--output={folder}/%j.out", *OPTIONS, f"run.dir={folder}/run", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next(line.split()[3] for line in done.stdout.splitlines() if line.endswith(" submitted"))


def finish(cluster: Cluster, folder: Path, job_id: str) -> str:
    """The job's output, once it is done."""
    job = cluster.wait(job_id, timeout=START_SECONDS)
    output = (folder / f"{job_id}.out").read_text()
    logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("run/slurm/*/*.log"))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output + logs
    return output


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def all_steps(run_dir: Path) -> list[int]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def attempts(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "slurm/attempts.jsonl").read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_nodes_compute_what_one_process_does(cluster: Cluster, tmp_path: Path, nodes: int, ranks: int) -> None:
    steps = ["trainer.max_steps=8", "parallelism=dp" if nodes == 4 else "parallelism=tp2"]
    output = finish(cluster, tmp_path, submit(cluster, tmp_path, nodes, ranks, *steps))
    assert "done (code 0)" in output
    alone = [sys.executable, "-W", "ignore", "-m", "nemo_llm.train", *OPTIONS, f"run.dir={tmp_path}/alone", steps[0]]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    hosts = {path.read_text() for path in tmp_path.glob("run/slurm/*/rank_*.host")}
    assert len(hosts) == nodes


def test_a_wrong_configuration_never_reaches_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.command("squeue", "-h", "--states=all", "-o", "%A")
    done = call(cluster, "slurm/pretrain.sh", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", *OPTIONS,
                f"run.dir={tmp_path}/run", "optim.lrr=1")  # fmt: skip
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr
    assert cluster.command("squeue", "-h", "--states=all", "-o", "%A") == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=3", "parallelism=tp2", "parallelism.tensor_model_parallel_size=4"], "processes"),
        (["--partition=nowhere"], "partitions here: high main"),
        (["--image=./nowhere.sqsh"], "--image=./nowhere.sqsh: no such file"),
        (["--container=apptainer", "--image=docker://x", "--mounts=/nowhere:/data"], "/nowhere does not exist here"),
        (["--container=docker"], "choose one of none pyxis apptainer"),
        (["--nodes=2-4"], "give one number"),
        (["run.dir=/proc/nowhere"], "choose another run.dir"),
    ],
)
def test_what_cannot_run_is_refused_with_the_fix(cluster: Cluster, words: list[str], said: str) -> None:
    done = call(cluster, "slurm/pretrain.sh", "--gpus-per-node=0", "--ntasks-per-node=2", *OPTIONS, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr


def test_under_plain_sbatch_a_wrong_configuration_ends_the_job_at_once(cluster: Cluster, tmp_path: Path) -> None:
    done = call(cluster, "slurm/pretrain.sh", *OPTIONS, f"run.dir={tmp_path}/run", "optim.lrr=1",
                launcher=("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2",
                          f"--output={tmp_path}/out"))  # fmt: skip
    job = cluster.wait(done.stdout.strip(), timeout=60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "did you mean optim.lr?" in (tmp_path / "out").read_text()
    assert not list(tmp_path.glob("run/slurm"))


def test_a_killed_rank_is_named_and_a_notice_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """One job: a rank is killed, all go on in the same allocation; then Slurm's notice, and on after a requeue."""
    import os
    import signal

    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, 2, 1, "trainer.max_steps=80", "checkpoint.save_interval=5")
    wait_for_step(run_dir, 6)
    os.kill(cluster.ranks()[-1], signal.SIGKILL)
    until = time.monotonic() + START_SECONDS
    while not (run_dir / "slurm/attempts.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    first = attempts(run_dir)[0]
    assert (first["class"], first["code"], first["step_before"]) == ("failed", 137, 0)
    wait_for_step(run_dir, first["step_after"] + 8)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    output = finish(cluster, tmp_path, job)
    assert [row["class"] for row in attempts(run_dir)] == ["failed", "preempted", "done"]
    assert [row["restart"] for row in attempts(run_dir)] == [0, 0, 1]
    assert f"first failing rank: {first['rank']} on {first['host']}, after step" in output
    assert all_steps(run_dir) == list(range(1, 81))


@pytest.mark.slow
def test_torchruns_agent_restarts_a_rank_in_the_job_and_a_notice_requeues(cluster: Cluster, tmp_path: Path) -> None:
    import os
    import signal

    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, 1, 2, "trainer.max_steps=80", "checkpoint.save_interval=5", "--launcher=torchrun")
    wait_for_step(run_dir, 6)
    os.kill(cluster.ranks()[-1], signal.SIGKILL)
    wait_for_step(run_dir, 20)
    assert not (run_dir / "slurm/attempts.jsonl").exists(), "the agent restarts ranks, not the job"
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    finish(cluster, tmp_path, job)
    assert [(row["class"], row["restart"]) for row in attempts(run_dir)] == [("preempted", 0), ("done", 1)]
    assert len(set(all_steps(run_dir))) == 80


@pytest.mark.slow
def test_a_chain_goes_on_where_requeue_is_not_allowed(cluster: Cluster, tmp_path: Path) -> None:
    """Three jobs: the first is told to stop, the second is done, the third never starts."""
    run_dir = tmp_path / "run"
    first = int(submit(cluster, tmp_path, 1, 1, "trainer.max_steps=30", "--chain=3"))
    wait_for_step(run_dir, 3)
    cluster.command("scancel", "--batch", "--signal=USR1", str(first))
    ended = [cluster.wait(str(job), timeout=START_SECONDS) for job in (first, first + 1, first + 2)]
    assert [job["JobState"] for job in ended] == ["FAILED", "COMPLETED", "CANCELLED"]
    assert ended[0]["ExitCode"] == "75:0"
    assert [row["class"] for row in attempts(run_dir)] == ["preempted", "done"]
    assert all_steps(run_dir) == list(range(1, 31))


def test_a_run_that_always_fails_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    """Its log cannot be opened: bounded attempts, and the job fails with the cause."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()  # the log of steps cannot be opened
    job = submit(cluster, tmp_path, 1, 1, "trainer.max_steps=3", "--max-retries=1")
    ended = cluster.wait(job, timeout=START_SECONDS)
    output = (tmp_path / f"{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), output
    assert "given up: 2 attempts in a row" in output
    assert "IsADirectoryError" in output


@pytest.mark.slow
def test_the_self_test_measures_within_and_across_nodes(cluster: Cluster, tmp_path: Path) -> None:
    done = call(cluster, "slurm/selftest.sh", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2",
                f"--output={tmp_path}/out", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended = cluster.wait(done.stdout.split()[3], timeout=START_SECONDS)
    output = (tmp_path / "out").read_text()
    assert ended["JobState"] == "COMPLETED", output
    for words in (
        "4 ranks on 2 nodes, gloo",
        "all-reduce,    1 MiB",
        "rank 0 to 1, within a node",
        "rank 0 to 2, across nodes",
        "passed: 20 steps on all ranks and in one process: losses within",
        "passed: saved at step 10, resumed: the losses of 10 steps are bit-equal",
    ):
        assert words in output


def test_a_sibling_runs_its_tool_on_one_node(cluster: Cluster, tmp_path: Path) -> None:
    done = call(cluster, "slurm/convert.sh", "--gpus-per-node=0", f"--output={tmp_path}/out", "input=/nowhere")
    assert done.returncode == 0, done.stderr
    ended = cluster.wait(done.stdout.split()[3], timeout=START_SECONDS)
    assert ended["ExitCode"] == "2:0", (tmp_path / "out").read_text()
    assert "problems in the configuration" in (tmp_path / "out").read_text()


def test_an_unfit_node_is_named_and_left_out(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first node's temporary folder has no room: the job requeues without the node and ends on another."""
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    cluster.on_node("node1", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/var/tmp")
    try:
        job = submit(cluster, tmp_path, 1, 1, "trainer.max_steps=2")
        output = finish(cluster, tmp_path, job)
    finally:
        cluster.on_node("node1", "umount", "/var/tmp")
    first, last = attempts(tmp_path / "run")
    assert (first["class"], first["nodes"]) == ("bad_node", "node1")
    assert "node1: /var/tmp has 0.00 GiB free" in first["reason"]
    assert "requeue without node1" in output
    assert "could not be set" not in output
    assert last["class"] == "done"
    assert last["nodes"] != "node1"


@pytest.mark.slow
def test_a_short_fault_run_ends_bit_equal() -> None:
    """Its fast sibling is `test_a_killed_rank_is_named_and_a_notice_requeues`."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.slurm_faults",
        "--ranks",
        "1",
        "--kinds",
        "kill a rank",
        "scontrol requeue",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 faults" in done.stdout
    assert "bit-equal" in done.stdout
