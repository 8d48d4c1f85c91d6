"""Memory of training steps: planned, and measured on GPUs. The rows are data; tests/planner holds the estimate to them.

``python -m benchmarks.memory_rows [--seconds 400] [--rows NAME ...] [--out FILE]`` measures rows of one GPU again, the most
informative first, each in a process of its own, until the time is over, and prints a line a row; the file gets one JSON
object each with the card, the date and the commit. ``--table`` prints the table of docs/planner.md, without a GPU.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_table import ROOT, machine
from nemo_llm.config.checks.code_paths import fused_chunk_tokens
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.planner.activations import tokens_per_rank
from nemo_llm.planner.memory import GIB, chunk_bytes
from nemo_llm.training.check_only import estimate_run

COMMON = [
    "trainer.max_steps=100", "exp_manager.enabled=false", "sample.enabled=false", "optim.sched.warmup_steps=10",
    "optim.sched.decay_steps=100", "performance.choose_matrix_kernels=false",
]  # fmt: skip
GPT2_TOKENS = 50257  # of the tokenizer that the models without a vocabulary of their own name

_TORCH = "model.transformer_impl=torch"
_TE = "model.transformer_impl=transformer_engine"
_SHARDED = "parallelism.use_distributed_optimizer=true"


def _batch(micro: int, whole: int) -> list[str]:
    return [f"trainer.micro_batch_size={micro}", f"trainer.global_batch_size={whole}"]


_SMALL = ["+model=llama3_1b", _TORCH, *_batch(8, 16)]
_UNFUSED = ["+model=llama3_1b", _TORCH, _SHARDED, "performance.fused_kernels=false"]
_LARGE = ["+model=llama3_8b", _TORCH, _SHARDED]
_LORA = [
    "+model=llama3_8b", "tokenizer=byte", "model.vocab_size=128256", _TORCH, "data=mock", "data.seq_length=4096", "peft=lora",
    "peft.rank=16",
]  # fmt: skip
_MOE = [
    "+model=mixtral_8x7b", "model.num_layers=6", "model.hidden_size=2048", "model.ffn_hidden_size=7168",
    "model.moe.moe_ffn_hidden_size=7168", "model.vocab_size=50304", "trainer.micro_batch_size=2",
]  # fmt: skip
_DOCUMENTS = [
    "+model=llama3_1b",
    _TORCH,
    *_batch(4, 8),
    "data.reset_attention_mask=true",
    "data.reset_position_ids=true",
]
_GEMMA = ["+model=gemma2_2b", "model.num_layers=6", _TORCH, "data.seq_length=4096", *_batch(1, 4)]
_LONG = ["+model=llama3_1b", _TORCH, _SHARDED, "parallelism.context_parallel_size=2", "data.split=null"]
_BY_MATRIX = "performance.flex_attention=false"
_ONE_BY_ONE = "model.moe.moe_grouped_gemm=false"
_QWEN3_MOE = ["+model=qwen3_30b_a3b", "model.num_layers=6", _TORCH, *_batch(2, 4)]
_DEEPSEEK = ["+model=deepseek_v2_lite", "model.num_layers=6", _TORCH, *_batch(2, 4)]
_OFFLOADED = "performance.offload_optimizer_moments=true"
_FULL = [
    "parallelism.recompute_granularity=full", "parallelism.recompute_method=uniform", "parallelism.recompute_num_layers=1",
]  # fmt: skip


@dataclass(frozen=True)
class MemoryRow:
    """One configuration.

    Attributes:
        overrides: beside `COMMON`.
        gib: ``torch.cuda.max_memory_allocated`` of the first rank, as measured; None: not measured yet.
        card: on which.
        date: when.
        commit: the last one before the figure was recorded.
        gpus: processes.
        second_chunk: measured while the fused loss held two chunks of logits at once: until the row is measured again
            it is compared with the estimate and that tensor on top.
    """

    overrides: list[str]
    gib: float | None = None
    card: str = "h100"
    date: str = ""
    commit: str = ""
    gpus: int = 1
    second_chunk: bool = True


def _row(overrides: list[str], gib: float, measured: tuple[str, str], gpus: int = 1, card: str = "h100") -> MemoryRow:
    return MemoryRow(overrides, gib, card, *measured, gpus)


_NOV_23 = ("2026-11-23", "f29180e")
_KERNELS = ("2026-11-26", "22b9bca")
_GPT = ("2026-11-26", "4194f47")
_BESIDE = ("2026-11-26", "c2bbac2")
_MUON = ("2026-11-26", "09fdc5e")
_OFFLOAD = ("2026-11-26", "4b2ce00")
_FLEX = ("2026-11-27", "7801e22")
_H200 = ("2026-11-29", "a577ccb")
_ONE_CHUNK = ("2026-11-29", "230dbbc")


def _again(overrides: list[str], gib: float) -> MemoryRow:
    """Measured since the fused loss holds one chunk of logits."""
    return MemoryRow(overrides, gib, "h200", *_ONE_CHUNK, second_chunk=False)


# Single-GPU rows first, those that say most first: this is the order in which they are measured again.
ROWS = {
    "1b bf16": _again(_SMALL, 59.2),
    "gemma3 1b": _again(["+model=gemma3_1b", _TORCH, *_batch(4, 16)], 55.0),
    "lora 8b": _again([*_LORA, *_batch(2, 8)], 51.2),
    "1b fp8": _again([*_SMALL, "precision=fp8_tensorwise"], 55.2),
    "gpt_1b, micro-batch 16": _row(["+model=gpt_1b", _TORCH, *_batch(16, 16)], 72.9, _FLEX),
    "qwen3 30b x6": _again(_QWEN3_MOE, 78.1),
    "deepseek v2 lite x6": _again(_DEEPSEEK, 63.5),
    "qwen3 30b x6, one by one": _row([*_QWEN3_MOE, _ONE_BY_ONE], 81.3, _H200, card="h200"),
    "deepseek v2 lite x6, one by one": _row([*_DEEPSEEK, _ONE_BY_ONE], 65.9, _H200, card="h200"),
    "1b full recomputation": MemoryRow([*_SMALL, *_FULL], card="h200"),
    "olmo2 1b": MemoryRow(["+model=olmo2_1b", _TORCH, *_batch(4, 8)], card="h200"),
    "1b fp16": MemoryRow([*_SMALL, *_batch(4, 8), "precision=fp16"], card="h200"),
    "1b documents by matrix": _row([*_DOCUMENTS, _BY_MATRIX], 43.5, _FLEX),
    "gemma2 x6": _row(_GEMMA, 34.6, _FLEX),
    "1b, MLP recomputed": MemoryRow(
        [*_SMALL, "parallelism.recompute_granularity=selective", "parallelism.recompute_modules=[mlp]"], card="h200"
    ),
    "moe": MemoryRow([*_MOE, _TORCH, "trainer.global_batch_size=8"], card="h200"),
    "moe, one by one": _row([*_MOE, _TORCH, "trainer.global_batch_size=8", _ONE_BY_ONE], 46.5, _BESIDE),
    "qlora 8b": _row([*_LORA, *_batch(2, 8), "peft.base_weights=nf4"], 42.6, _BESIDE),
    "dora 8b x8": MemoryRow([*_LORA, "model.num_layers=8", *_batch(2, 2), "peft.kind=dora"], card="h200"),
    "1b muon": _row([*_SMALL, "optim=muon"], 56.6, _MUON),
    "1b moments offloaded": _row([*_SMALL, _OFFLOADED], 51.8, _MUON),
    "1b 2 layers offloaded": _row([*_SMALL, "performance.offload_activation_layers=2"], 55.7, _OFFLOAD),
    "1b 4 layers offloaded": _row([*_SMALL, "performance.offload_activation_layers=4"], 51.1, _OFFLOAD),
    "gemma2 x6 by matrix": _row([*_GEMMA, _BY_MATRIX], 42.3, _FLEX),
    "1b, kernels apart": _row([*_UNFUSED, *_batch(8, 16)], 62.7, _NOV_23, card="h200"),
    "1b, whole logits": _row(
        [*_UNFUSED, *_batch(4, 16), "performance.fused_linear_cross_entropy=false"], 60.3, _NOV_23
    ),
    "1b, micro-batch 4": _row([*_SMALL, *_batch(4, 16)], 41.5, _BESIDE),
    "1b fp8, micro-batch 4": _row([*_SMALL, *_batch(4, 16), "precision=fp8_tensorwise"], 39.9, _KERNELS),
    "gpt_1b": _row(["+model=gpt_1b", _TORCH, *_batch(8, 16)], 48.7, _GPT),
    "lora 8b, micro-batch 1": _row([*_LORA, *_batch(1, 1)], 34.1, _KERNELS),
    "lora 8b, micro-batch 3": _row([*_LORA, *_batch(3, 3)], 69.3, _GPT),
    "1b documents": _row(_DOCUMENTS, 41.5, _FLEX),
    "1b, kernels apart, micro-batch 4": _row([*_UNFUSED, *_batch(4, 16)], 42.7, _NOV_23),
    "1b, kernels and rotation apart": _row([*_UNFUSED, *_batch(4, 16), "performance.fused_rope=false"], 42.7, _NOV_23),
    "1b fp8 te": _row(["+model=llama3_1b", _TE, *_batch(8, 16), "precision=fp8_delayed"], 57.1, _KERNELS),
    "moe te": _row([*_MOE, _TE, "model.moe.moe_grouped_gemm=true", "trainer.global_batch_size=8"], 46.7, _BESIDE),
    "1b, two GPUs": _row([*_SMALL, _SHARDED, *_batch(8, 32)], 53.3, _KERNELS, 2),
    "1b fp8, two GPUs": _row([*_SMALL, _SHARDED, *_batch(8, 32), "precision=fp8_tensorwise"], 49.2, _BESIDE, 2),
    "1b muon, two GPUs": _row([*_SMALL, _SHARDED, *_batch(8, 32), "optim=muon"], 51.0, _MUON, 2),
    "1b 32k cp2": _row([*_LONG, "data.seq_length=32768", *_batch(1, 4)], 35.7, _BESIDE, 2),
    "1b 128k cp2": _row([*_LONG, "data.seq_length=131072", *_batch(1, 1), *_FULL], 25.1, _BESIDE, 2),
    "moe ep2, one by one": _row(
        [*_MOE, _TORCH, _SHARDED, "trainer.global_batch_size=16", "parallelism.expert_model_parallel_size=2", _ONE_BY_ONE],
        29.4, _BESIDE, 2,
    ),
    "8b x12 4096": _row(
        [*_LARGE, "model.num_layers=12", "data.seq_length=4096", *_batch(2, 16)], 56.0, _KERNELS, 2
    ),
    "8b x12 8192": _row([*_LARGE, "model.num_layers=12", *_batch(1, 8)], 56.1, _KERNELS, 2),
    "8b 8192, moments offloaded": _row([*_LARGE, *_batch(1, 16), _OFFLOADED, *_FULL], 64.8, _MUON, 2),
    "1b, kernels apart, two GPUs": _row([*_UNFUSED, *_batch(8, 32)], 55.8, _NOV_23, 2, "h200"),
    "8b 4096, kernels apart": _row(
        [*_LARGE, "performance.fused_kernels=false", "data.seq_length=4096", *_batch(1, 32)], 109.2, _NOV_23, 2, "h200"
    ),
    "8b 8192, kernels apart": _row(
        [*_LARGE, "performance.fused_kernels=false", *_batch(1, 32)], 128.5, _NOV_23, 2, "h200"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """GiB by the estimate: allocated by the present code; by the code that was measured; all that the card must have."""

    allocated: float
    as_measured: float
    total: float


def configuration(row: MemoryRow) -> RunConfig:
    """The row's, with the memory of its card."""
    return compose([*COMMON, *row.overrides, f"cluster={row.card}"])


def plan(row: MemoryRow, cfg: RunConfig) -> Planned:
    """The estimate for a row."""
    estimate, setting, before = estimate_run(cfg, row.gpus, GPT2_TOKENS), cfg.model_setting, 0.0
    peak, rows = estimate.peak, estimate.parameters.word_embeddings // cfg.model.hidden_size
    chunk = fused_chunk_tokens(setting)
    # Capped logits have so much beside them that a second chunk was never alive at the peak.
    if (
        row.second_chunk
        and chunk is not None
        and tokens_per_rank(setting) > chunk
        and not cfg.model.final_logit_softcapping
    ):
        before = max(peak.moments["loss"] + chunk_bytes(setting, rows) - peak.moments[peak.moment], 0.0)
    return Planned(peak.allocated / GIB, (peak.allocated + before) / GIB, peak.total / GIB)


def table() -> str:
    """Markdown of all rows, planned against measured."""
    lines = [
        "| row | GPUs | measured GiB | planned for that code | error | planned now | with allowance | date, commit |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, row in ROWS.items():
        planned = plan(row, configuration(row))
        gpus = f"{row.gpus} {row.card.upper()}"
        if row.gib is None:
            end = f"{planned.allocated:.1f} | {planned.total:.1f} | not measured |"
            lines.append(f"| {name} | {gpus} | | | | {end}")
            continue
        error = planned.as_measured / row.gib - 1
        lines.append(
            f"| {name} | {gpus} | {row.gib} | {planned.as_measured:.1f} | {error:+.1%} | {planned.allocated:.1f} | "
            f"{planned.total:.1f} | {row.date}, {row.commit} |"
        )
    return "\n".join(lines)


def measure(name: str, row: MemoryRow, timeout: float) -> dict:
    """The row's RESULT of `benchmarks.step_speed` in a process of its own, or what went wrong."""
    command = [
        sys.executable, "-W", "ignore", "-m", "benchmarks.step_speed", *COMMON, *row.overrides,
        "trainer.accelerator=cuda", "--steps", "2", "--warm", "2", "--name", name,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"no result in {timeout:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        return {"name": name, "failed": f"exit code {done.returncode}: {' '.join(errors)[:300]}"}
    return json.loads(found[-1].removeprefix("RESULT "))


def describe(planned: Planned, result: dict) -> str:
    """One line: planned and measured, and what the card needs beside what PyTorch allocates."""
    if "failed" in result:
        return f"{result['name']}: planned {planned.allocated:.1f} GiB; failed: {result['failed']}"
    allocated, error = result["allocated_gib"], planned.allocated / result["allocated_gib"] - 1
    above = result["driver_gib"] - allocated
    return (
        f"{result['name']}: planned {planned.allocated:.1f} GiB, measured {allocated:.1f} ({error:+.1%}); reserved "
        f"{result['reserved_gib']:.1f}, driver {result['driver_gib']:.1f}: {above:.1f} above, planned "
        f"{planned.total - planned.allocated:.1f}"
    )


def main() -> int:
    """Measure what fits into the time; 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=400.0, help="in which to measure")
    parser.add_argument(
        "--rows", nargs="*", default=[name for name, row in ROWS.items() if row.gpus == 1], metavar="NAME"
    )
    parser.add_argument("--out", type=Path, default=Path("memory_rows.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of docs/planner.md and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return 0
    began, failed = time.monotonic(), False
    where = {"machine": machine(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": _commit()}
    print(json.dumps(where), flush=True)
    for name in arguments.rows:
        left = arguments.seconds - (time.monotonic() - began)
        if left < 20:  # less than a process needs to start
            break
        result = measure(name, ROWS[name], left)
        failed |= "failed" in result
        print(describe(plan(ROWS[name], configuration(ROWS[name])), result), flush=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps({**result, **where}) + "\n")
    return int(failed)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
