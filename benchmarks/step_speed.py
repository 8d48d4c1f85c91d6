"""Time the training step of any configuration and say where the time goes.

``python -m benchmarks.step_speed +model=llama3_1b trainer.micro_batch_size=4 [--steps 30] [--profile] [--name NAME]``, on one process or under
torchrun. Prints one JSON line beginning with RESULT; with --profile a table of kernels by kind.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

KINDS = {
    "attention": ("flash", "fmha", "attention", "cudnn_generated", "sdpa"),
    "matrices": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "wgmma"),
    "communication": ("nccl",),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "copy_kernel", "catarray", "memset", "fill"),
    "softmax, reduce": ("reduce", "softmax"),
    "compiled (Triton)": ("triton",),
}


def kind_of(kernel: str) -> str:
    """Which part of a step a CUDA kernel belongs to, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise, other")


def main() -> None:
    """Build the run, warm up, time, profile."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--name", default="")
    parser.add_argument("--losses", type=Path, default=None, help="write the loss of every step to this file")
    arguments, overrides = parser.parse_known_args()

    from nemo_llm.config.checks import check
    from nemo_llm.config.commands.entry import intended_world_size
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    cfg = compose(overrides)
    check(cfg, intended_world_size(cfg))
    runtime = start_runtime(cfg.runtime_setting)
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    began = time.perf_counter()
    run = build_training_run(cfg, runtime)
    built = time.perf_counter() - began
    losses = [train_step(run).loss for _ in range(arguments.warm)]
    torch.cuda.synchronize()
    times = []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        losses.append(train_step(run).loss)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    if runtime.is_first_rank:
        print(
            "RESULT",
            json.dumps({**figures(arguments.name, run, times, losses, built), **memory(runtime.device)}),
            flush=True,
        )
        if arguments.losses is not None:
            arguments.losses.parent.mkdir(parents=True, exist_ok=True)
            arguments.losses.write_text(json.dumps(losses))
    if arguments.profile:
        profile(lambda: train_step(run), runtime.is_first_rank)
    stop_runtime()


def memory(device: torch.device) -> dict[str, float]:
    """GiB at the peak: what PyTorch allocated and what it reserved; and what the driver sees in use on the GPU now."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "driver_gib": round((total - free) / 2**30, 2),
    }


def figures(name: str, run, times: list[float], losses: list[float], built: float) -> dict:
    """Speed by the median step, in both conventions of model FLOPs."""
    from nemo_llm.config.sections.arithmetic import padded_vocab_size
    from nemo_llm.planner.flops import flops_per_token
    from nemo_llm.run.throughput import find_peak
    from nemo_llm.training.loop import peak_memory_gib

    cfg = run.cfg
    step = sorted(times)[len(times) // 2]
    tokens = cfg.trainer.global_batch_size * cfg.data.seq_length / run.runtime.world_size
    vocab = padded_vocab_size(cfg.model.vocab_size or run.tokenizer.vocab_size, cfg.model.make_vocab_size_divisible_by)
    flops = flops_per_token(cfg.model, cfg.data.seq_length, vocab)
    peak = find_peak(cfg.cluster, run.runtime.device)
    return {
        "name": name or cfg.model.name,
        "devices": run.runtime.world_size,
        "step_ms": round(step * 1e3, 1),
        "slowest_ms": round(max(times) * 1e3, 1),
        "tokens_per_second_per_device": round(tokens / step),
        "tflops_causal": round(flops.causal * tokens / step / 1e12, 1),
        "mfu_full": None if peak is None else round(flops.full * tokens / step / 1e12 / peak.tflops, 3),
        "peak_gib": round(peak_memory_gib(run.runtime.device), 1),
        "loss_first_last": [round(losses[0], 4), round(losses[-1], 4)],
        "build_seconds": round(built, 1),
    }


def profile(step: Callable[[], object], shown: bool = True) -> None:
    """One step under the profiler: kernel time by kind, and the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    if not shown:
        return
    kernels = [
        event
        for event in profiler.key_averages()
        if event.self_device_time_total > 0 and event.device_type.name == "CUDA"
    ]
    by_kind: dict[str, float] = defaultdict(float)
    for event in kernels:
        by_kind[kind_of(event.key)] += event.self_device_time_total / 1e3
    total = sum(by_kind.values())
    print(f"PROFILE kernels {total:.1f} ms, wall {wall * 1e3:.1f} ms (with the profiler's cost)")
    for kind, milliseconds in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"PROFILE {kind:20} {milliseconds:8.1f} ms {milliseconds / total:6.1%}")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:24]:
        print(
            f"PROFILE   {event.self_device_time_total / 1e3:8.2f} ms {event.count:5} {kind_of(event.key)[:12]:12} {event.key[:100]}"
        )


if __name__ == "__main__":
    sys.exit(main())
