"""A run on a real Slurm cluster, disturbed again and again, against one left alone: ``python -m benchmarks.slurm_faults``

Starts a cluster of emulated nodes on this machine (tests/slurm/cluster.py), submits ``slurm/pretrain.sh`` on all nodes
but one spare, and does to it what clusters do, in an order drawn from ``--seed``. After the last fault the run is told to
stop, and an undisturbed one takes as many steps: all weights and optimizer state must be equal bit by bit; with changes
of the node count among the faults, losses and gradient norms within 1e-5. Prints a table: wasted steps and seconds.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from nemo_llm.checkpoint.inspect import diff
from nemo_llm.resilience.stop_signals import STOP_FILE_NAME
from tests.slurm.cluster import FINAL_STATES, Cluster, what_is_missing

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [
    "+model=gpt_tiny", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_layers=2", "precision=fp32",
    "data.seq_length=64", "trainer.global_batch_size=8", "trainer.micro_batch_size=1", "trainer.accelerator=cpu",
    "trainer.log_interval=1", "trainer.val_interval=null", "trainer.val_steps=1", "exp_manager.enabled=false",
    "sample.enabled=false", "optim.lr=3.0e-4",
]  # fmt: skip
SAVE_INTERVAL = 5
STEPS_TO_A_FAULT = (6, 18)
NODE_COUNT_TOLERANCE = 1e-5
# Room of the file system that the run is written to: some checkpoints, and quickly filled.
DISK_MIB = 192
RECOVERY_SECONDS = 600.0


@dataclass(frozen=True)
class Fault:
    """What was done, at which step, from which checkpoint the run went on, and after how long."""

    kind: str
    step: int
    resumed_from: int
    seconds: float
    nodes: int
    """Of the job afterwards."""

    @property
    def wasted(self) -> int:
        return max(0, self.step - self.resumed_from)


class Trial:
    """One disturbed job on a cluster."""

    def __init__(self, cluster: Cluster, run_dir: Path, submit: Callable[[int], str], choice: random.Random):
        """``submit`` takes a number of nodes and returns the job's id."""
        self.cluster, self.run_dir, self.submit, self.choice = cluster, run_dir, submit, choice
        self.job_id = submit(cluster.num_nodes - 1)

    def step(self) -> int:
        """Last step in ``metrics.jsonl``."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.run_dir / "metrics.jsonl").read_bytes().split(b"\n")[-2])["step"])
        return 0

    def nodes(self) -> list[str]:
        shown = self.cluster.job(self.job_id)["NodeList"]
        return self.cluster.command("scontrol", "show", "hostnames", shown).split()

    def kill_rank(self) -> None:
        os.kill(self.choice.choice(self.cluster.ranks()), signal.SIGKILL)

    def kill_node(self) -> None:
        """Power failure of a node of the job; it comes back half a minute later."""
        node = self.choice.choice(self.nodes())
        self.cluster.kill_node(node)
        self._later(30, node)

    def kill_slurmd(self) -> None:
        """The node's daemon dies; the ranks go on out of Slurm's sight."""
        node = self.choice.choice(self.nodes())
        self.cluster.kill_slurmd(node)
        self._later(30, node)

    def _later(self, seconds: float, node: str) -> None:
        self.returning = getattr(self, "returning", {}) | {node: time.monotonic() + seconds}

    def tend(self) -> None:
        """Bring back nodes whose time has come."""
        for node, due in list(getattr(self, "returning", {}).items()):
            if time.monotonic() > due:
                del self.returning[node]
                self.cluster.kill_node(node)  # what a rebooted node has left running: nothing
                self.cluster.start_node(node, wait=False)

    def preempt(self) -> None:
        """A job of higher priority wants the nodes for a second."""
        self.cluster.command(
            "sbatch", "--partition=high", f"--nodes={self.cluster.num_nodes}", "--exclusive", "--output=/dev/null",
            "--wrap=sleep 1",
        )  # fmt: skip

    def time_limit(self) -> None:
        """Moves the end of the job so near that Slurm sends its notice."""
        hours, minutes, seconds = map(int, self.cluster.job(self.job_id)["RunTime"].rpartition("-")[2].split(":"))
        limit = hours * 60 + minutes + (2 if seconds > 30 else 1)
        self.cluster.command("scontrol", "update", f"JobId={self.job_id}", f"TimeLimit={limit}")

    def notice(self) -> None:
        self.cluster.command("scancel", "--batch", "--signal=USR1", self.job_id)

    def requeue(self) -> None:
        """The administrator's requeue: no notice, SIGTERM at once."""
        self.cluster.command("scontrol", "requeue", self.job_id)

    def change_node_count(self) -> None:
        """The user cancels the job and submits it again on one node less, or on the one more that it had."""
        whole = self.cluster.num_nodes - 1
        count = whole if len(self.nodes()) < whole else max(1, whole - 1)
        self.cluster.command("scancel", self.job_id)
        self.cluster.wait(self.job_id)
        self.job_id = self.submit(count)

    def full_disk(self) -> None:
        """Something else fills the file system; it is cleared when the run has failed of it."""
        filler = self.run_dir.parent / "filler"
        attempts = self.attempts()
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        until = time.monotonic() + 60
        while self.attempts() == attempts and time.monotonic() < until and self.cluster.ranks():
            time.sleep(0.2)
        time.sleep(1)
        filler.unlink()

    def attempts(self) -> int:
        """Starts of the training program so far."""
        return len(list(self.run_dir.glob("slurm/*/rank_0000.host")))

    def recover(self, kind: str, step: int, attempts: int, began: float) -> Fault:
        """Wait for the first step of a later attempt; where that one began says what was lost."""
        until = began + RECOVERY_SECONDS
        while time.monotonic() < until:
            self.tend()
            state = self.cluster.job(self.job_id)
            if kind == "time limit" and state["JobState"] == "PENDING":
                self.cluster.command("scontrol", "update", f"JobId={self.job_id}", "TimeLimit=UNLIMITED")
            if state["JobState"] in FINAL_STATES:
                break
            found = self.resumed_from() if self.attempts() > attempts else None
            if found is not None and self.step() > found:
                return Fault(kind, step, found, time.monotonic() - began, len(self.nodes()))
            time.sleep(0.1)
        raise RuntimeError(
            f"no step within {RECOVERY_SECONDS} s of '{kind}' at step {step}: {self.cluster.job(self.job_id)}"
        )

    def resumed_from(self) -> int | None:
        """Step that the newest attempt says it resumed from; 0 where it began anew, None where it has not said."""
        newest = max(self.run_dir.glob("slurm/*/rank_0000.host"), key=lambda path: path.stat().st_mtime, default=None)
        log = newest.with_suffix(".log") if newest else None
        text = log.read_text(errors="replace") if log and log.exists() else ""
        if "resumed from" in text:
            return int(text.partition("resumed from")[2].partition("at step")[2].split()[0])
        return 0 if "step 1/" in text else None


KINDS: dict[str, Callable[[Trial], None]] = {
    "kill a rank": Trial.kill_rank,
    "node loses power": Trial.kill_node,
    "slurmd dies": Trial.kill_slurmd,
    "preemption": Trial.preempt,
    "time limit": Trial.time_limit,
    "notice (scancel --signal)": Trial.notice,
    "scontrol requeue": Trial.requeue,
    "full disk": Trial.full_disk,
    "another node count": Trial.change_node_count,
}


def submit(cluster: Cluster, run_dir: Path, nodes: int, ranks: int, options: Sequence[str]) -> str:
    """Submit ``slurm/pretrain.sh``; returns the job's id."""
    own = {
        "NEMO_LLM_PYTHON": sys.executable,
        "NEMO_LLM_WAIT_SECONDS": "3",
        "NEMO_LLM_MIN_FREE_MIB": "8",
        "NEMO_LLM_START_SECONDS": "30",
    }
    environment = cluster.environment | own | {"OMP_NUM_THREADS": "1"}
    command = [
        "bash", str(ROOT / "slurm/pretrain.sh"), f"--nodes={nodes}", "--gpus-per-node=0",
        f"--ntasks-per-node={ranks}", f"--output={run_dir.parent}/%j.out", "--signal=B:USR1@45",
        *OPTIONS, f"run.dir={run_dir}", f"checkpoint.save_interval={SAVE_INTERVAL}", *options,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return next(line.split()[3] for line in done.stdout.splitlines() if line.endswith(" submitted"))


def disturb(trial: Trial, kinds: Sequence[str]) -> list[Fault]:
    """Each of `kinds`, some steps after the run has recovered from the one before."""
    faults = []
    for kind in kinds:
        due = trial.step() + trial.choice.randint(*STEPS_TO_A_FAULT)
        while trial.step() < due:
            trial.tend()
            if trial.cluster.job(trial.job_id)["JobState"] in FINAL_STATES:
                raise RuntimeError(f"the job ended at step {trial.step()}, before '{kind}' at {due}")
            time.sleep(0.02)
        attempts, began, step = trial.attempts(), time.monotonic(), trial.step()
        KINDS[kind](trial)
        faults.append(trial.recover(kind, step, attempts, began))
        print(f"{len(faults):3} {kind:26} at step {step:5}, on from {faults[-1].resumed_from:5}: {faults[-1].wasted:2} "
              f"steps again, {faults[-1].seconds:5.1f} s, {faults[-1].nodes} nodes", flush=True)  # fmt: skip
    return faults


def table(faults: Sequence[Fault]) -> str:
    rows = ["| fault | count | steps again: mean, most | seconds to the next step: mean, most |", "|---|---|---|---|"]
    for kind in KINDS:
        own = [fault for fault in faults if fault.kind == kind]
        if own:
            wasted, seconds = [fault.wasted for fault in own], [fault.seconds for fault in own]
            rows.append(
                f"| {kind} | {len(own)} | {mean(wasted):.1f}, {max(wasted)} | {mean(seconds):.0f}, {max(seconds):.0f} |"
            )
    return "\n".join(rows)


def run(folder: Path, nodes: int, ranks: int, kinds: Sequence[str], choice: random.Random) -> int:
    """The disturbed run, one left alone, and their comparison; returns 0 where they are equal."""
    whole, disturbed = folder / "disk/whole", folder / "disk/run"
    with Cluster(folder / "cluster", nodes) as cluster:
        began = time.monotonic()
        endless = ["trainer.max_steps=1000000"]
        trial = Trial(cluster, disturbed, lambda count: submit(cluster, disturbed, count, ranks, endless), choice)
        while trial.step() < 1 and cluster.job(trial.job_id)["JobState"] not in FINAL_STATES:
            time.sleep(0.1)
        seconds = time.monotonic() - began
        print(f"submission to first step {seconds:.1f} s on {nodes - 1} nodes of {ranks} ranks", flush=True)
        faults = disturb(trial, kinds)
        (disturbed / STOP_FILE_NAME).touch()
        state = cluster.wait(trial.job_id, timeout=300)["JobState"]
        steps = trial.step()
        print(table(faults), flush=True)
        if state != "COMPLETED":
            raise RuntimeError(f"the disturbed run is {state}")
        alone = submit(cluster, whole, nodes - 1, ranks, [f"trainer.max_steps={steps}"])
        if (state := cluster.wait(alone, timeout=3600)["JobState"]) != "COMPLETED":
            raise RuntimeError(f"the undisturbed run is {state}")
    if "another node count" in kinds:
        worst = largest_difference(whole, disturbed)
        good = worst < NODE_COUNT_TOLERANCE and len({fault.nodes for fault in faults}) > 1
        verdict = f"losses and gradient norms within {worst:.1e} of the undisturbed run's"
    else:
        differences = list(diff(whole, disturbed))
        good = not differences
        verdict = "all tensors bit-equal to the undisturbed run's" if good else f"different: {differences[0]}"
    print(f"{len(faults)} faults, {steps} steps; {verdict}")
    return int(not good)


def largest_difference(whole: Path, disturbed: Path) -> float:
    """Largest relative difference of a step's loss or gradient norm."""
    found = []
    for folder in (whole, disturbed):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append({row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row})
    assert found[0].keys() == found[1].keys(), f"steps {len(found[0])} and {len(found[1])}"
    return max(abs(a - b) / abs(a) for step in found[0] for a, b in zip(found[0][step], found[1][step], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3, help="one of them is the spare")
    parser.add_argument("--ranks", type=int, default=2, help="processes a node")
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="exactly these, in this order")
    parser.add_argument("--keep", type=Path, help="folder to leave everything in")
    arguments = parser.parse_args()
    if reason := what_is_missing():
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    choice = random.Random(arguments.seed)
    usual = [kind for kind in KINDS if kind != "another node count"]
    kinds = arguments.kinds or [usual[number % len(usual)] for number in range(arguments.faults)]
    if not arguments.kinds:
        choice.shuffle(kinds)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="slurm_faults_"))
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)], check=True)
    try:
        return run(folder, arguments.nodes, arguments.ranks, kinds, choice)
    except BaseException:
        for output in sorted(disk.glob("*.out")):
            print(f"== {output.name}\n{output.read_text()[-4000:]}", file=sys.stderr)
        raise
    finally:
        if arguments.keep:
            shutil.copytree(disk, folder / "kept", dirs_exist_ok=True)
        subprocess.run(["umount", "-l", str(disk)], check=False)
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
