"""What a checkpoint costs: seconds that training stands still, bytes per second, memory, beside Megatron's own form.

``torchrun --nproc-per-node 2 -m benchmarks.checkpoint_stall --model gpt_1b [--override key=value ...]``. Takes steps with
and without saves in the background, then a save that is waited for, a load, ``dd`` on the same disk, and what
Megatron's ``fully_reshardable`` form of the optimizer takes before anything is written. The first rank prints the table.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from nemo_llm.checkpoint.manifest import read_manifest, verify
from nemo_llm.checkpoint.weights import model_state
from nemo_llm.config.compose.load import compose
from nemo_llm.parallel.runtime import start_runtime, stop_runtime
from nemo_llm.run.folder import to_plain, write_config
from nemo_llm.training.checkpoint import finish_saving, load_checkpoint, save_checkpoint
from nemo_llm.training.setup import build_training_run
from nemo_llm.training.step import train_step

INTERVAL_SECONDS = 60


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gpt_1b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nemo_llm_checkpoint_stall"))
    parser.add_argument("--steps", type=int, default=6, help="steps without a save")
    parser.add_argument("--background-saves", type=int, default=2, choices=(1, 2))
    parser.add_argument("--background-only", action="store_true", help="no save that is waited for, load or dd")
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    cfg = compose([
        f"+model={arguments.model}", "data=mock", "trainer.max_steps=1000", "parallelism.use_distributed_optimizer=true",
        "checkpoint.keep_last=1", "exp_manager.enabled=false", "sample.enabled=false", *arguments.override,
    ])  # fmt: skip
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = arguments.folder
    first = run.runtime.is_first_rank
    if first:
        shutil.rmtree(arguments.folder, ignore_errors=True)
        arguments.folder.mkdir(parents=True)
        write_config(run.run_dir, to_plain(cfg))
        print(f"{arguments.model}, {dist.get_world_size()} ranks, {device_name(run)}", flush=True)
    dist.barrier()
    try:
        measure_background(run, arguments.steps, arguments.background_saves)
        if not arguments.background_only:
            measure_waiting(run)
        megatron_form(run)
        tell(
            run,
            "peak host memory of this rank",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB",
        )
    finally:
        if first:
            shutil.rmtree(arguments.folder, ignore_errors=True)
        stop_runtime()
    return 0


def tell(run: Any, name: str, value: str) -> None:
    """One line of the table, from the first rank."""
    if run.runtime.is_first_rank:
        print(f"  {name:52} {value}", flush=True)


def measure_background(run: Any, steps: int, saves: int) -> None:
    """Save while training; the first such save allocates and locks the host memory."""
    for _ in range(3):
        timed_step(run)
    base = median(timed_step(run) for _ in range(steps))
    tell(run, "step without a save, median", f"{base:.3f} s")
    for number in range(saves):
        peak = memory_gib(run)
        began = time.perf_counter()
        save_checkpoint(run, in_background=True)
        call = time.perf_counter() - began
        slower = []
        while still_writing(run):
            slower.append(timed_step(run) - base)
        finish_saving(run)
        taken, stall = time.perf_counter() - began, call + sum(slower)
        tell(
            run,
            f"save {number + 1} in the background",
            f"call {call:.3f} s; {len(slower)} steps until it was written {sum(slower):+.3f} s beyond plain ones",
        )
        tell(
            run,
            "  training stood still for",
            f"{stall:.3f} s = {stall / INTERVAL_SECONDS:.2%} of {INTERVAL_SECONDS} s; written {taken:.1f} s after its begin; "
            f"device memory +{memory_gib(run) - peak:.2f} GiB",
        )
    tell(run, "host memory of the copies, this rank", f"{run.saver.writer.buffer.num_bytes / 2**30:.2f} GiB")


def measure_waiting(run: Any) -> None:
    """A save that training waits for, the disk's own speed, verifying, loading."""
    timed_step(run)
    began = time.perf_counter()
    folder = save_checkpoint(run)
    seconds = time.perf_counter() - began
    total = sum(entry["bytes"] for entry in read_manifest(folder)["files"].values())
    tell(run, "save that is waited for", f"{total / 1e9:.2f} GB in {seconds:.1f} s = {total / 1e9 / seconds:.2f} GB/s")
    if run.runtime.is_first_rank:
        tell(run, "dd on the same disk, one stream, then two", disk_rate(run.run_dir, total))
    dist.barrier()
    began = time.perf_counter()
    read = verify(folder, "full", (run.runtime.rank, run.runtime.world_size))
    dist.barrier()
    seconds = time.perf_counter() - began
    tell(run, "verify fully (its share of the load)", f"{seconds:.1f} s, {read / 1e9:.2f} GB by this rank")
    began = time.perf_counter()
    load_checkpoint(run, folder)
    dist.barrier()
    seconds = time.perf_counter() - began
    tell(run, "load", f"{seconds:.1f} s = {total / 1e9 / seconds:.2f} GB/s")


def megatron_form(run: Any) -> None:
    """Time and device memory that Megatron's fully reshardable state dict takes, before anything is written."""
    before = memory_gib(run)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    began = time.perf_counter()
    try:
        state = run.optimizer.sharded_state_dict(
            model_state(run.model)["model0"],
            metadata={
                "distrib_optim_sharding_type": "fully_reshardable",
                "distrib_optim_fully_reshardable_mem_efficient": False,
            },
        )
        del state
        note = f"{time.perf_counter() - began:.2f} s, device memory +{memory_gib(run) - before:.2f} GiB"
    except torch.OutOfMemoryError:
        note = "out of device memory"
    tell(run, "Megatron's fully_reshardable optimizer, gathering alone", note)


def still_writing(run: Any) -> bool:
    """Whether any rank is; the same on all."""
    flag = torch.tensor(int(run.saver.is_writing), device=run.runtime.device)
    dist.all_reduce(flag)
    return bool(flag.item())


def timed_step(run: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    train_step(run)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def disk_rate(folder: Path, total: int) -> str:
    """GB/s of dd with fsync, half of the checkpoint's size each (2 GiB at most), alone and two at a time."""
    count = max(4, min(total, 4 << 30) >> 24)
    rates = []
    for streams in (1, 2):
        began = time.perf_counter()
        running = [
            subprocess.Popen(
                ["dd", "if=/dev/zero", f"of={folder}/dd{n}", "bs=8M", f"count={count}", "conv=fsync"],
                stderr=subprocess.DEVNULL,
            )
            for n in range(streams)
        ]
        for process in running:
            process.wait()
        rates.append(streams * count * (8 << 20) / 1e9 / (time.perf_counter() - began))
        for n in range(streams):
            os.unlink(f"{folder}/dd{n}")
    return ", ".join(f"{rate:.2f} GB/s" for rate in rates)


def memory_gib(run: Any) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if run.runtime.device.type == "cuda" else 0.0


def device_name(run: Any) -> str:
    return torch.cuda.get_device_name() if run.runtime.device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main())
