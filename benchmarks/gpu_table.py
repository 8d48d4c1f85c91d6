"""The speed table of docs/benchmarks-gpu.md: any of its rows by one command, ours and the peers in turns.

``python -m benchmarks.gpu_table [--rows NAME ...] [--out gpu_table.jsonl]``. Each row runs in processes of its own; a row that is
in the file already is not run again, so a run that was stopped goes on where it stopped. Ends with the table: tokens/s and the
ratio to the row's peer, the machine and the versions. ``--list`` prints the rows.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = [
    "-m", "benchmarks.step_speed", "trainer.max_steps=100", "exp_manager.enabled=false", "sample.enabled=false",
    "optim.sched.warmup_steps=10", "optim.sched.decay_steps=100",
]  # fmt: skip
PEER = ["-m", "benchmarks.peer_pytorch"]
MEGATRON = ["-m", "benchmarks.peer_megatron"]
TRANSFORMERS = ["-m", "benchmarks.peer_transformers", "--micro-batch", "2", "--micro-batches", "2"]
SMALL = ["+model=llama3_1b", "trainer.global_batch_size=16", "trainer.micro_batch_size=8"]
GPT = ["+model=gpt_1b", "trainer.global_batch_size=16", "trainer.micro_batch_size=8"]
MOE = [
    "+model=mixtral_8x7b", "model.num_layers=6", "model.hidden_size=2048", "model.ffn_hidden_size=7168",
    "model.moe.moe_ffn_hidden_size=7168", "model.vocab_size=50304", "trainer.global_batch_size=8", "trainer.micro_batch_size=2",
]  # fmt: skip
# Layers of many small experts, whose number is cut so that one card holds them.
QWEN3_MOE = ["+model=qwen3_30b_a3b", "model.num_layers=6", "data.seq_length=4096"]
DEEPSEEK_V2 = ["+model=deepseek_v2_lite", "model.num_layers=6", "data.seq_length=4096"]
TWICE = ["model.transformer_impl=torch", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
ONE_BY_ONE = ["model.moe.moe_grouped_gemm=false"]
TWO = [
    "+model=llama3_1b", "trainer.global_batch_size=32", "trainer.micro_batch_size=8", "model.transformer_impl=torch",
    "parallelism.use_distributed_optimizer=true",
]  # fmt: skip
DOCUMENTS = [
    "+model=llama3_1b", "model.transformer_impl=torch", "trainer.global_batch_size=8", "trainer.micro_batch_size=4",
    "data.reset_attention_mask=true", "data.reset_position_ids=true",
]  # fmt: skip
GEMMA = [
    "+model=gemma2_2b", "model.num_layers=6", "model.transformer_impl=torch", "data.seq_length=4096",
    "trainer.global_batch_size=4", "trainer.micro_batch_size=1",
]  # fmt: skip
BY_MATRIX = ["performance.flex_attention=false"]
FULL = [
    "parallelism.recompute_granularity=full", "parallelism.recompute_method=uniform", "parallelism.recompute_num_layers=1",
]  # fmt: skip
LARGE = ["+model=llama3_8b", "parallelism.use_distributed_optimizer=true", "model.transformer_impl=torch"]
LONG = [
    "+model=llama3_1b", "trainer.micro_batch_size=1", "model.transformer_impl=torch", "parallelism.context_parallel_size=2",
    "parallelism.use_distributed_optimizer=true", "data.split=null",
]  # fmt: skip


@dataclass(frozen=True)
class SpeedRow:
    """One line: what to run on how many GPUs, and the row that it is compared with."""

    command: list[str]
    gpus: int = 1
    peer: str | None = None


ROWS = {
    "1b peer": SpeedRow([*PEER, "--micro-batch", "8", "--micro-batches", "2"]),
    "1b peer mcore te": SpeedRow([*MEGATRON, "--model", "llama3_1b"]),
    "1b peer mcore te fp8": SpeedRow([*MEGATRON, "--model", "llama3_1b", "--fp8"]),
    "1b bf16": SpeedRow([*OURS, *SMALL, "model.transformer_impl=torch"], peer="1b peer"),
    "1b bf16 te": SpeedRow([*OURS, *SMALL, "model.transformer_impl=transformer_engine"], peer="1b peer"),
    "1b muon": SpeedRow([*OURS, *SMALL, "model.transformer_impl=torch", "optim=muon"], peer="1b bf16"),
    "1b moments offloaded": SpeedRow(
        [*OURS, *SMALL, "model.transformer_impl=torch", "performance.offload_optimizer_moments=true"], peer="1b bf16"
    ),
    **{
        f"1b {count} layers offloaded": SpeedRow(
            [*OURS, *SMALL, "model.transformer_impl=torch", f"performance.offload_activation_layers={count}"],
            peer="1b bf16",
        )
        for count in (2, 3, 4)
    },
    "1b fp8": SpeedRow([*OURS, *SMALL, "model.transformer_impl=torch", "precision=fp8_tensorwise"], peer="1b peer mcore te fp8"),
    "1b fp8 te": SpeedRow([*OURS, *SMALL, "precision=fp8_delayed"], peer="1b peer mcore te fp8"),
    "gpt_1b peer": SpeedRow([*MEGATRON, "--model", "gpt_1b", "--seq", "2048", "--micro-batch", "8", "--micro-batches", "2"]),
    "gpt_1b bf16": SpeedRow([*OURS, *GPT, "model.transformer_impl=torch"], peer="gpt_1b peer"),
    "gpt_1b bf16, micro-batch 16": SpeedRow(
        [*OURS, *GPT, "model.transformer_impl=torch", "trainer.micro_batch_size=16"], peer="gpt_1b peer"
    ),
    "1b documents by matrix": SpeedRow([*OURS, *DOCUMENTS, *BY_MATRIX]),
    "1b documents": SpeedRow([*OURS, *DOCUMENTS], peer="1b documents by matrix"),
    "gemma2 x6 by matrix": SpeedRow([*OURS, *GEMMA, *BY_MATRIX]),
    "gemma2 x6": SpeedRow([*OURS, *GEMMA], peer="gemma2 x6 by matrix"),
    "moe peer": SpeedRow([*MEGATRON, "--model", "moe", "--micro-batch", "2", "--micro-batches", "4"]),
    "moe bf16": SpeedRow([*OURS, *MOE, "model.transformer_impl=torch"], peer="moe peer"),
    "moe bf16 te": SpeedRow(
        [*OURS, *MOE, "model.transformer_impl=transformer_engine", "model.moe.moe_grouped_gemm=true"], peer="moe peer"
    ),
    "qwen3_30b x6 peer": SpeedRow([*TRANSFORMERS, *QWEN3_MOE]),
    "qwen3_30b x6": SpeedRow([*OURS, *QWEN3_MOE, *TWICE], peer="qwen3_30b x6 peer"),
    "qwen3_30b x6 one by one": SpeedRow([*OURS, *QWEN3_MOE, *TWICE, *ONE_BY_ONE], peer="qwen3_30b x6 peer"),
    "deepseek_v2_lite x6 peer": SpeedRow([*TRANSFORMERS, *DEEPSEEK_V2]),
    "deepseek_v2_lite x6": SpeedRow([*OURS, *DEEPSEEK_V2, *TWICE], peer="deepseek_v2_lite x6 peer"),
    "1b bf16, two GPUs": SpeedRow([*OURS, *TWO], 2, "1b bf16"),
    "1b fp8, two GPUs": SpeedRow([*OURS, *TWO, "precision=fp8_tensorwise"], 2, "1b bf16, two GPUs"),
    "1b muon, two GPUs": SpeedRow([*OURS, *TWO, "optim=muon"], 2, "1b bf16, two GPUs"),
    "1b 32k cp2": SpeedRow([*OURS, *LONG, "data.seq_length=32768", "trainer.global_batch_size=4"], 2),
    "1b 128k cp2": SpeedRow(
        [*OURS, *LONG, "data.seq_length=131072", "trainer.global_batch_size=1", *FULL], 2,
    ),
    "8b x12 peer 4096": SpeedRow(
        [*PEER, "--model", "llama3_8b", "--layers", "12", "--micro-batch", "2", "--micro-batches", "4"], 2
    ),
    "8b x12 peer mcore te 4096": SpeedRow(
        [*MEGATRON, "--model", "llama3_8b", "--layers", "12", "--micro-batch", "1", "--micro-batches", "8"], 2
    ),
    "8b x12 4096": SpeedRow(
        [*OURS, *LARGE, "model.num_layers=12", "data.seq_length=4096", "trainer.micro_batch_size=2",
         "trainer.global_batch_size=16"], 2, "8b x12 peer 4096",
    ),
    "8b x12 peer 8192": SpeedRow(
        [*PEER, "--model", "llama3_8b", "--layers", "12", "--seq", "8192", "--micro-batch", "1", "--micro-batches", "4"], 2
    ),
    "8b x12 8192": SpeedRow(
        [*OURS, *LARGE, "model.num_layers=12", "data.seq_length=8192", "trainer.micro_batch_size=1",
         "trainer.global_batch_size=8"], 2, "8b x12 peer 8192",
    ),
    "8b peer 4096": SpeedRow([*PEER, "--model", "llama3_8b", "--micro-batch", "2", "--micro-batches", "8"], 2),
    "8b 4096": SpeedRow(
        [*OURS, *LARGE, "data.seq_length=4096", "trainer.micro_batch_size=1", "trainer.global_batch_size=32"], 2,
        "8b peer 4096",
    ),
    "8b 4096, two H100": SpeedRow(
        [*OURS, *LARGE, "data.seq_length=4096", "trainer.micro_batch_size=1", "trainer.global_batch_size=32",
         "performance.offload_optimizer_moments=true", *FULL], 2,
    ),
}  # fmt: skip


def run(name: str, row: SpeedRow, timeout: int, more: list[str]) -> dict:
    """The row's RESULT, or what went wrong."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row.gpus)] if row.gpus > 1 else []
    )
    command = [sys.executable, "-W", "ignore", *launcher, *row.command, "--name", name, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            output, complaints = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's ranks too: they hold the GPUs' memory
            return {"name": name, "failed": f"no result in {timeout} s"}
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not found:
        said = (complaints or output).splitlines()
        errors = [line for line in said if "Error: " in line] or said  # torchrun's own report comes last
        return {"name": name, "failed": f"exit code {process.returncode}: {errors[0] if errors else ''}"[:400]}
    return {**json.loads(found[-1].removeprefix("RESULT ")), "name": name}


def table(results: dict[str, dict], rows: dict[str, SpeedRow]) -> str:
    """Markdown, with each row's ratio to its peer."""
    lines = ["| row | tokens/s a GPU | step ms | peak GiB | ratio |", "|---|--:|--:|--:|--:|"]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"| {name} | failed: {result['failed'].splitlines()[-1][:120]} | | | |")
            continue
        speed, peer = result["tokens_per_second_per_device"], results.get(rows[name].peer or "", {})
        ratio = f"{speed / peer['tokens_per_second_per_device']:.3f}" if "tokens_per_second_per_device" in peer else ""
        lines.append(f"| {name} | {speed:,} | {result['step_ms']} | {result['peak_gib']} | {ratio} |")
    return "\n".join(lines)


def machine() -> str:
    """GPUs and versions, in one line."""
    import torch

    parts = [f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"]
    for package in ("torch", "triton", "megatron-core", "transformer-engine"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)


def main(rows: dict[str, SpeedRow] = ROWS) -> int:
    """Run what is missing, print the table; 1 where a row failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=list(rows), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("gpu_table.jsonl"))
    parser.add_argument("--timeout", type=int, default=300, help="seconds for a row")
    parser.add_argument("--list", action="store_true")
    parser.add_argument(
        "--with", dest="more", nargs=argparse.REMAINDER, default=[], help="more arguments for every row"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.rows) - set(rows))
    if arguments.list or unknown:
        print("\n".join([*(f"no row {name!r}; the rows are:" for name in unknown), *rows]))
        return int(bool(unknown)) * 2
    results: dict[str, dict] = {}
    if arguments.out.exists():
        results = {row["name"]: row for row in map(json.loads, arguments.out.read_text().splitlines())}
    for name in arguments.rows:
        if name in results and "failed" not in results[name]:
            continue
        results[name] = run(name, rows[name], arguments.timeout, arguments.more)
        with arguments.out.open("a") as file:
            file.write(json.dumps(results[name]) + "\n")
        print(json.dumps(results[name]), flush=True)
    chosen = {name: results[name] for name in arguments.rows}
    print(f"\n{machine()}\n\n{table(chosen, rows)}")
    return int(any("failed" in result for result in chosen.values()))


if __name__ == "__main__":
    sys.exit(main())
