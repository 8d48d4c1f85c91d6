"""Every setting of recomputation that the checks accept, beside the same model without: loss, gradient norm, memory.

``python -m benchmarks.gpu_smoke --recompute`` runs all rows in one process, on the GPU where there is one (under three
minutes) and else, smaller, on the CPU. A row fails when it raises, when its two steps give another loss or norm, or when
it calls no module again, which is to recompute nothing.
"""

import gc
import time
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from nemo_llm.config import RunConfig
from nemo_llm.config.checks import find_problems
from nemo_llm.config.compose.load import compose
from nemo_llm.parallel.runtime import ParallelRuntime, start_runtime
from nemo_llm.training.setup import build_training_run
from nemo_llm.training.step import train_step

_ALONE = ("core_attn", "mlp", "layernorm", "mla_up_proj", "moe", "moe_act", "shared_experts")
_TOGETHER = ("core_attn,mlp,layernorm", "core_attn,layernorm,moe", "core_attn,mlp,layernorm,mla_up_proj")
_EXPERTS = (
    "model.moe={num_moe_experts:4,moe_router_topk:2,moe_ffn_hidden_size:64,moe_aux_loss_coeff:0.01,"
    "moe_z_loss_coeff:0.001,moe_router_load_balancing_type:aux_loss,moe_router_score_function:softmax,"
    "moe_router_pre_softmax:false,moe_token_dispatcher_type:alltoall,moe_shared_expert_intermediate_size:64,"
    "moe_layer_freq:1,moe_grouped_gemm:true}"
)
_LATENT = "model.mla={q_lora_rank:16,kv_lora_rank:16,qk_head_dim:16,qk_pos_emb_head_dim:8,v_head_dim:16}"
_WIDE_EXPERTS = _EXPERTS.replace("size:64", "size:1024")
_WIDE_LATENT = "model.mla={q_lora_rank:256,kv_lora_rank:256,qk_head_dim:64,qk_pos_emb_head_dim:32,v_head_dim:64}"


@dataclass(frozen=True)
class RecomputeRow:
    """A model and a setting by their names, and the whole configuration."""

    model: str
    setting: str
    cfg: RunConfig


@dataclass(frozen=True)
class RecomputeOutcome:
    """What a row gave: why it failed, the largest relative difference of loss and norm to no recomputation, peak memory."""

    row: RecomputeRow
    error: str | None
    difference: float
    gib: float
    seconds: float


@dataclass(frozen=True)
class Steps:
    """Loss and gradient norm of two steps, calls of modules in the second, and peak memory on the GPU in bytes."""

    figures: list[float]
    calls: int
    memory: int


def settings() -> dict[str, dict[str, Any]]:
    """Keys of ``parallelism`` by a short name: each part alone, some together, whole layers."""
    selective = {
        name: {"recompute_granularity": "selective", "recompute_modules": name.split(",")}
        for name in (*_ALONE, *_TOGETHER)
    }
    full = {
        f"full {method} {count}": {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": count,
        }
        for method in ("uniform", "block")
        for count in (1, 2)
    }
    return selective | full


def models(on_gpu: bool) -> dict[str, tuple[str, ...]]:
    """Models whose layers differ in what can be recomputed."""
    size = (2048, 4, 1024, 2816, 16, "bf16") if on_gpu else (64, 2, 64, 96, 4, "fp32")
    length, batch, hidden, inner, heads, precision = size
    experts, latent = (_WIDE_EXPERTS, _WIDE_LATENT) if on_gpu else (_EXPERTS, _LATENT)
    base = (
        "+model=gpt_tiny", "data=mock", "tokenizer=byte", f"data.seq_length={length}",
        f"trainer.micro_batch_size={batch}", f"trainer.global_batch_size={batch}", "model.num_layers=4",
        f"model.hidden_size={hidden}", f"model.ffn_hidden_size={inner}", f"model.num_attention_heads={heads}",
        f"trainer.accelerator={'auto' if on_gpu else 'cpu'}", "model.transformer_impl=torch",
        "exp_manager.enabled=false", "optim.sched.warmup_steps=0", "performance.choose_matrix_kernels=false",
    )  # fmt: skip
    grouped, alike = f"model.num_query_groups={heads // 2}", f"model.num_query_groups={heads}"
    found = {
        "dense": (grouped,),
        "dense, dropout": (grouped, "model.hidden_dropout=0.1", "model.attention_dropout=0.1"),
        "dense, norms after": (grouped, "model.norm_placement=post"),
        "dense, norms around": (grouped, "model.norm_placement=both"),
        "dense, parallel residual": (grouped, "model.parallel_residual=true"),
        "dense, soft caps": (grouped, "model.attn_logit_softcapping=20.0"),
        "dense, LoRA": (grouped, "+peft=lora", "checkpoint.init_from=null"),
        "dense, FP8": (grouped,),
        "experts": (grouped, experts),
        "experts in every other layer": (grouped, experts.replace("layer_freq:1", "layer_freq:2")),
        "latent attention": (alike, latent),
        "latent attention, experts": (alike, latent, experts),
    }
    if on_gpu:
        found["dense, offloaded"] = (grouped, "performance.offload_activation_layers=2")
        if find_spec("transformer_engine") is not None:
            te = "model.transformer_impl=transformer_engine"
            found["dense, Transformer Engine"] = (grouped, te)
            found["experts, Transformer Engine"] = (grouped, te, experts)
    fp8 = {name: "fp8_tensorwise" if "FP8" in name else precision for name in found}
    return {name: (*base, f"precision={fp8[name]}", *arguments) for name, arguments in found.items()}


def rows(on_gpu: bool, only: Collection[str]) -> Iterator[RecomputeRow]:
    """The rows, each model's without recomputation first: every combination that no check refuses."""
    for model, arguments in models(on_gpu).items():
        if only and model not in only:
            continue
        cfg = compose(list(arguments))
        yield RecomputeRow(model, "none", cfg)
        for setting, keys in settings().items():
            changed = replace(cfg, parallelism=replace(cfg.parallelism, **keys))
            if not find_problems(changed, 1):
                yield RecomputeRow(model, setting, changed)


def two_steps(cfg: RunConfig, runtime: ParallelRuntime) -> Steps:
    """Build the run and take two steps; the memory is what they and the model take beyond what was there before."""
    gc.collect()
    calls, before, on_gpu = 0, 0, runtime.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run = build_training_run(cfg, runtime)

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    results = [train_step(run)]  # on a GPU it compiles, in which modules are called too
    hook = register_module_forward_pre_hook(count)
    try:
        results.append(train_step(run))
    finally:
        hook.remove()
    figures = [figure for result in results for figure in (result.loss, result.grad_norm)]
    return Steps(figures, calls, torch.cuda.max_memory_allocated() - before if on_gpu else 0)


def measure(on_gpu: bool, only: Collection[str] = ()) -> Iterator[RecomputeOutcome]:
    """Run the rows of these models, else of all, in the layout of one process."""
    plain, runtime = Steps([], 0, 0), None
    for row in rows(on_gpu, only):
        began, error, difference, memory = time.perf_counter(), None, float("nan"), 0
        try:
            runtime = runtime or start_runtime(row.cfg.runtime_setting)
            steps = two_steps(row.cfg, runtime)
            plain, memory = steps if row.setting == "none" else plain, steps.memory
            difference = max(abs(a - b) / abs(b) for a, b in zip(steps.figures, plain.figures, strict=True))
            if not difference <= (tolerance := _tolerance(row, on_gpu)):
                error = f"differs by more than {tolerance:.0e}"
            elif row.setting != "none" and steps.calls <= plain.calls:
                error = "recomputes nothing"
        except Exception as failure:  # a row that raises is what this looks for
            error = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        yield RecomputeOutcome(row, error, difference, memory / 2**30, time.perf_counter() - began)


def _tolerance(row: RecomputeRow, on_gpu: bool) -> float:
    """A residual that is added before it is rounded, not after, differs by bf16's steps, which FP8 makes larger."""
    if not on_gpu:
        return 1e-5
    return 1e-1 if row.cfg.precision.fp8 is not None else 1e-2


def main() -> int:
    """Print the outcome of every row, then one table; 1 when a row failed."""
    warnings.simplefilter("ignore")
    on_gpu = torch.cuda.is_available()
    began, outcomes = time.perf_counter(), []
    for outcome in measure(on_gpu):
        outcomes.append(outcome)
        state = "ok" if outcome.error is None else f"FAILED {outcome.error}"
        print(f"{outcome.row.model}, {outcome.row.setting}: {outcome.seconds:.1f} s {state}", flush=True)
    print("\n| model | recomputed | | difference | peak GiB |\n|---|---|---|--:|--:|")
    for outcome in outcomes:
        state = "ok" if outcome.error is None else "FAILED"
        memory = f"{outcome.gib:.2f}" if on_gpu else "-"
        print(f"| {outcome.row.model} | {outcome.row.setting} | {state} | {outcome.difference:.1e} | {memory} |")
    failed = sum(outcome.error is not None for outcome in outcomes)
    print(f"{len(outcomes)} rows, {failed} failed, {time.perf_counter() - began:.0f} s")
    return int(failed > 0)
