"""Kill a run without warning, again and again, at random moments; is anything ever lost?

``python -m benchmarks.checkpoint_kills --kills 200 --seed 1 [--ranks 2]``. A journey is one run of a small model (bf16,
dropout, a blend, packed documents) that is killed with SIGKILL several times, resumed each time, and let to its end.
Half of the kills come at a random time, half at a random file operation (an open, a rename, a removal: in a save, in the
building of the data's index, in the retention of old checkpoints). After each kill the newest complete checkpoint must
verify and be no older than the one before; at its end a journey's losses and weights must equal, bit by bit, those of
a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from nemo_llm.checkpoint.folder import find_checkpoint, step_of
from nemo_llm.checkpoint.manifest import verify
from nemo_llm.errors import NemoLlmError

STEPS = 12
KILLS_A_JOURNEY = 5
OPTIONS = [
    "+model=gpt_tiny", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4", "model.num_layers=2",
    "precision=bf16", "parallelism.use_distributed_optimizer=true", "model.hidden_dropout=0.1",
    "data.blend=[{name: a, weight: 0.7, text: 'asset:shakespeare'}, {name: b, weight: 0.3, text: 'asset:moby_dick'}]",
    "data.packing=best_fit", "data.seq_length=64", f"trainer.max_steps={STEPS}", "trainer.global_batch_size=4",
    "trainer.micro_batch_size=1", "trainer.log_interval=1", "trainer.val_interval=6", "trainer.val_steps=1",
    "trainer.deterministic=true", "trainer.accelerator=cpu", "checkpoint.save_interval=1", "checkpoint.keep_last=2",
    "exp_manager.enabled=false", "sample.enabled=false",
]  # fmt: skip
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="checkpoint_kills_"))
    counts = trials(folder, arguments.kills, arguments.seed, arguments.ranks)
    for name, count in sorted(counts.items()):
        print(f"  {name:40} {count}")
    shutil.rmtree(folder)
    return int(any(name.startswith("FAILED") for name in counts))


def trials(folder: Path, kills: int, seed: int, ranks: int) -> Counter[str]:
    """Run journeys until ``kills`` kills were made; returns how often what happened."""
    import torch

    import nemo_llm.training.setup  # noqa: F401  once for all runs, which are forked from here

    torch.set_num_threads(
        1
    )  # OpenMP's threads, that an import may have started, don't survive a fork: a run would hang
    choose = random.Random(seed)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    undisturbed = folder / "undisturbed"
    assert run(undisturbed, ranks, None) == 0, (undisturbed / "log").read_text()[-3000:]
    seconds = time.monotonic() - began
    wanted = losses(undisturbed)
    assert [step for step, *_ in wanted] == list(range(1, STEPS + 1))
    while counts["kills"] < kills:
        journey = folder / f"journey_{counts['journeys']}"
        counts["journeys"] += 1
        for _ in range(min(KILLS_A_JOURNEY, kills - counts["kills"])):
            before = newest(journey)
            moment: float | int = choose.uniform(0, seconds) if choose.random() < 0.5 else choose.randint(1, 400)
            code = run(journey, ranks, moment)
            if code == 0:
                counts["reached the end before the kill"] += 1
                break
            assert code == -signal.SIGKILL, f"{moment}: exit code {code}\n{(journey / 'log').read_text()[-3000:]}"
            counts["kills"] += 1
            counts[f"kills at a {'time' if isinstance(moment, float) else 'file operation'}"] += 1
            counts[judge(journey, before)] += 1
        code = run(journey, ranks, None)
        counts["journeys bit-equal" if code == 0 and same(journey, undisturbed, wanted) else "FAILED journeys"] += 1
        if code or not same(journey, undisturbed, wanted):
            print(f"{journey}: exit code {code}\n{(journey / 'log').read_text()[-3000:]}", file=sys.stderr)
        else:
            shutil.rmtree(journey)
    counts["seconds"] = round(time.monotonic() - began)
    return counts


def judge(journey: Path, before: int) -> str:
    """What a kill left behind."""
    found = find_checkpoint(journey)
    step = newest(journey)
    if step < before:
        return "FAILED: a checkpoint was lost"
    try:
        if found is not None:
            verify(found)
    except NemoLlmError as error:
        print(error, file=sys.stderr)
        return "FAILED: the newest checkpoint is damaged"
    unfinished = list((journey / "checkpoints").glob(".step_*.tmp"))
    return "kills in a save (whole one before it used)" if unfinished else "kills outside of a save"


def newest(journey: Path) -> int:
    """Step of the newest complete checkpoint; 0 for none."""
    found = find_checkpoint(journey)
    return (step_of(found) or 0) if found else 0


def same(journey: Path, undisturbed: Path, wanted: list[tuple]) -> bool:
    """Whether losses, gradient norms and every tensor of the last checkpoint are equal bit by bit."""
    from nemo_llm.checkpoint.inspect import diff

    return losses(journey) == wanted and not list(diff(undisturbed, journey))


def losses(run_dir: Path) -> list[tuple]:
    """(step, loss, gradient norm) of each logged step."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def run(run_dir: Path, ranks: int, moment: float | int | None, log: Path | None = None) -> int:
    """Train in forked processes; kill one at ``moment`` (seconds, or the number of a file operation), all others with it.

    Returns the exit code, -9 when killed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    log = log or run_dir / "log"
    port = free_port()
    victim = random.Random(repr(moment)).randrange(ranks)
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            train(
                run_dir,
                log,
                (rank, ranks, port),
                moment if isinstance(moment, int) and rank == victim else None,
                OPTIONS,
            )
        children.append(pid)
    if isinstance(moment, float):
        until = time.monotonic() + moment
        while (
            time.monotonic() < until
            and os.waitid(os.P_PID, children[victim], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.005)
        os.kill(children[victim], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(children[victim], 0)[1])]
    for rank, child in enumerate(children):
        if rank != victim:
            if codes[0]:
                os.kill(child, signal.SIGKILL)  # as a launcher does
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes[0] or max(codes, key=abs)


def train(run_dir: Path, log: Path, place: tuple[int, int, int], kill_at: int | None, options: list[str]) -> None:
    """The forked process; never returns."""
    rank, ranks, port = place
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    from nemo_llm.config.commands.entry import run_entry_point
    from nemo_llm.train import main as train_main

    if kill_at is not None:
        kill_at_file_operation(run_dir, kill_at)
    code = 1
    try:
        code = run_entry_point(train_main, [*options, f"run.dir={run_dir}", f"data.cache_dir={log.parent}/cache"])
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill_at_file_operation(folder: Path, number: int) -> None:
    """Let this process kill itself at its ``number``-th file operation in ``folder``."""
    left = [number]

    def count(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
