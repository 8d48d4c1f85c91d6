"""First day on a new cluster: ``sbatch slurm/selftest.sh``. How fast do the ranks reach each other, and do they agree?

Prints the bandwidth of all-reduce, and of messages from rank 0 to a rank of its node and of another node, by size. Then
all ranks train gpt_tiny for 20 steps, save, and go on from what was saved; one process alone takes the same steps. It
starts the same process groups as training does, so that what is wrong with the fabric shows here first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nemo_llm.errors import ExitCode
from nemo_llm.log import is_first_rank, launched_world_size

_SIZES_MIB = {"cuda": (1, 16, 256), "cpu": (1, 16)}
_REPEATS = 5
_MIB = 1 << 20
_STEPS = 20
_SAVED_AT = 10
_TOLERANCE = {"cuda": 2e-4, "cpu": 1e-5}
"""Relative difference of losses (fp32) that another order of additions explains after 20 steps of Adam."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", help="message sizes in MiB")
    parser.add_argument("--folder", type=Path, default=Path("runs/selftest"), help="on a disk that all nodes share")
    parser.add_argument("--alone", type=int, metavar="SAMPLES", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    import torch
    import torch.distributed as dist

    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    samples = arguments.alone or _samples(launched_world_size())
    cfg = _configuration(samples)
    runtime = start_runtime(cfg)
    if arguments.alone:
        print("LOSSES", json.dumps(_train(cfg, runtime, None)[0]))
        stop_runtime()
        return ExitCode.DONE
    try:
        place, device = runtime.place, runtime.device
        _say(f"{place.world_size} ranks on {place.num_nodes} nodes, {dist.get_backend()}, torch {torch.__version__}")
        peers = {"within a node": 1, "across nodes": place.local_world_size}
        if place.local_world_size == 1:
            del peers["within a node"]
        for mib in arguments.sizes or _SIZES_MIB[device.type]:
            payload = torch.ones(mib * _MIB // 4, device=device)
            seconds = _seconds(partial(dist.all_reduce, payload), device)
            # Bus bandwidth as nccl-tests count it: independent of the number of ranks.
            bus = 2 * (place.world_size - 1) / place.world_size * mib / 1024 / seconds
            _say(f"all-reduce, {mib:4} MiB: {bus:8.2f} GiB/s of bus bandwidth")
            for name, peer in peers.items():
                if peer < place.world_size:
                    seconds = _seconds(partial(_send, payload, peer), device)
                    _say(f"rank 0 to {peer}, {name}, {mib:4} MiB: {mib / 1024 / seconds:8.2f} GiB/s")
        if is_first_rank():
            shutil.rmtree(arguments.folder, ignore_errors=True)
        losses, resumed = _train(cfg, runtime, arguments.folder)
    finally:
        stop_runtime()
    if not is_first_rank():
        return ExitCode.DONE  # the first rank's verdict is the job's
    shutil.rmtree(arguments.folder, ignore_errors=True)
    agree = _compare_with_one_process(losses, samples, device.type)
    again = resumed == losses[_SAVED_AT:]
    found = "bit-equal" if again else f"{resumed}, and without {losses[_SAVED_AT:]}"
    _verdict(again, f"saved at step {_SAVED_AT}, resumed: the losses of {_STEPS - _SAVED_AT} steps are {found}")
    return ExitCode.DONE if agree and again else ExitCode.FAILED


def _samples(world_size: int) -> int:
    """Of a global batch that all ranks share evenly."""
    return world_size * max(1, 16 // world_size)


def _configuration(samples: int):
    from nemo_llm.config.load import compose

    return compose([
        "+model=gpt_tiny", "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4",
        "data.seq_length=64",
        "data=mock", "precision=fp32", "trainer.deterministic=true", "trainer.micro_batch_size=1",
        f"trainer.global_batch_size={samples}", f"trainer.max_steps={_STEPS}", "optim.sched.warmup_steps=2",
        f"optim.sched.decay_steps={_STEPS}",
    ])  # fmt: skip


def _train(cfg, runtime, folder: Path | None) -> tuple[list[float], list[float]]:
    """Losses of 20 steps; with a folder a checkpoint goes there, and its steps come once more from it."""
    from nemo_llm.training.checkpoint import CheckpointSaver, load_checkpoint
    from nemo_llm.training.rundir import to_plain, write_config
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    run = build_training_run(cfg, runtime)
    if folder is None:
        return [train_step(run).loss for _ in range(_STEPS)], []
    run.run_dir = folder
    if runtime.is_first_rank:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, to_plain(cfg))
    losses = [train_step(run).loss for _ in range(_SAVED_AT)]
    saved = CheckpointSaver(run).save(run, in_background=False)
    losses += [train_step(run).loss for _ in range(_STEPS - _SAVED_AT)]
    run = build_training_run(cfg, runtime)
    load_checkpoint(run, saved)
    return losses, [train_step(run).loss for _ in range(_STEPS - _SAVED_AT)]


def _compare_with_one_process(losses: list[float], samples: int, device: str) -> bool:
    """The first rank takes the same steps alone, in a process that knows of no launcher."""
    command = [sys.executable, "-m", "nemo_llm.selftest", "--alone", str(samples)]
    launcher = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        _verdict(False, f"one process alone ended with code {done.returncode}: {done.stderr[-1000:]}")
        return False
    alone = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOSSES ")).split(" ", 1)[1])
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
    allowed = _TOLERANCE[device]
    text = f"{_STEPS} steps on all ranks and in one process: losses within {worst:.1e} ({allowed:.0e} allowed)"
    _verdict(worst < allowed, text)
    return worst < allowed


def _verdict(passed: bool, text: str) -> None:
    print(f"{'passed' if passed else 'FAILED'}: {text}", flush=True)


def _send(payload: object, peer: int) -> None:
    """One message from rank 0 to `peer`; the other ranks do nothing."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        dist.send(payload, peer)
    elif dist.get_rank() == peer:
        dist.recv(payload, 0)


def _seconds(work: Callable[[], object], device: object) -> float:
    """Mean time of `work` on all ranks, after one call that connects."""
    import torch
    import torch.distributed as dist

    for repeats in (1, _REPEATS):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        dist.barrier()
        if torch.device(str(device)).type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / _REPEATS


def _say(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
