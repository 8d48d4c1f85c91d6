"""What ``trainer.check_only=true`` prints: layout, stages, parameters and memory; refuses what cannot fit the GPU."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_llm.config.checks import find_problems
from nemo_llm.config.checks.recompute import UNUSED_MODULES
from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.planner.flops import flops_per_token
from nemo_llm.planner.memory import GIB, MemoryEstimate, estimate_memory

_MOST_SUGGESTIONS = 3


def estimate_run(cfg: RunConfig, world_size: int, tokenizer_vocab_size: int) -> MemoryEstimate:
    """Memory of every pipeline stage.

    Args:
        tokenizer_vocab_size: taken where `model.vocab_size` is null.
    """
    vocab_size, muon = _vocab_size(cfg, tokenizer_vocab_size), cfg.optim.muon is not None
    return estimate_memory(cfg.model_setting, world_size, vocab_size, cfg.trainer.global_batch_size, muon)


def _vocab_size(cfg: RunConfig, tokenizer_vocab_size: int) -> int:
    return padded_vocab_size(cfg.model.vocab_size or tokenizer_vocab_size, cfg.model.make_vocab_size_divisible_by)


def report(cfg: RunConfig, world_size: int, tokenizer_vocab_size: int) -> str:
    """The plan of a run as text.

    Args:
        tokenizer_vocab_size: as for `estimate_run`.

    Raises:
        ConfigError: the run needs more memory than `cluster.gpu_memory_gib`.
    """
    estimate = estimate_run(cfg, world_size, tokenizer_vocab_size)
    vocab_size = _vocab_size(cfg, tokenizer_vocab_size)
    flops = flops_per_token(cfg.model, cfg.data.seq_length, vocab_size)
    counted, layout = estimate.parameters, estimate.layout
    active = "" if counted.active == counted.total else f", {_millions(counted.active)} active per token"
    microbatches = layout.num_microbatches(cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size)
    text = "\n".join(
        [
            f"model {cfg.model.name}: {_millions(counted.total)} parameters{active}; vocabulary {vocab_size} padded",
            f"FLOPs per token: {flops.causal / 1e9:.3f} G causal, {flops.full / 1e9:.3f} G full attention",
            f"layout: {layout.describe()}",
            f"step: {cfg.trainer.global_batch_size} samples of {cfg.data.seq_length} tokens, "
            f"{microbatches} micro-batches of {cfg.trainer.micro_batch_size} per pipeline",
            "",
            estimate.plan.table(),
            "",
            f"estimated memory per rank, GiB ({cfg.precision.name})",
            estimate.table(),
        ]
    )
    check_fits(cfg, estimate, text)
    return f"{text}\n{_verdict(cfg, estimate)}"


def check_card(cfg: RunConfig, world_size: int, tokenizer_vocab_size: int, card: tuple[str, float]) -> str | None:
    """Compare a run that is about to start with the GPU that it found.

    Args:
        card: name, and GiB of memory.

    Returns:
        A warning where the run may not fit; None where it does, or nothing is known of layers of the user's own.

    Raises:
        ConfigError: as for `report`, had `cluster` named this GPU.
    """
    if cfg.model.layer_spec is not None:
        return None
    name, gib = card
    found = replace(cfg, cluster=replace(cfg.cluster, gpu_name=name, gpu_memory_gib=round(gib, 1)))
    estimate = estimate_run(found, world_size, tokenizer_vocab_size)
    check_fits(found, estimate, f"estimated memory per rank, GiB\n{estimate.table()}")
    return _verdict(found, estimate) if _is_close(found, estimate) else None


def check_fits(cfg: RunConfig, estimate: MemoryEstimate, shown: str = "") -> None:
    """Refuse a run that needs more memory than the named GPU has, were the estimate as far off as it may be.

    Args:
        shown: put before the message, so that the reader sees where the memory goes.

    Raises:
        ConfigError: naming the largest part and what makes it smaller.
    """
    available = cfg.cluster.gpu_memory_gib
    if available is None or not cfg.trainer.check_memory or estimate.peak.least <= available * GIB:
        return
    peak = estimate.peak
    largest = peak.parts()[peak.largest] / GIB
    problem = Problem(
        "cluster.gpu_memory_gib",
        available,
        f"the run needs about {peak.total / GIB:.1f} GiB per GPU, most of it for {peak.largest} ({largest:.1f} GiB)",
        f"{_suggest(cfg, estimate)}; or go on anyway with trainer.check_memory=false",
    )
    error = ConfigError([problem])
    if shown:
        error.args = (f"{shown}\n\n{error}",)
    raise error


def _is_close(cfg: RunConfig, estimate: MemoryEstimate) -> bool:
    """Whether the whole estimate, which is not refused, is above the memory of the GPU."""
    available = cfg.cluster.gpu_memory_gib
    return available is not None and estimate.peak.total > available * GIB


def _verdict(cfg: RunConfig, estimate: MemoryEstimate) -> str:
    needed = estimate.peak.total / GIB
    if cfg.cluster.gpu_memory_gib is None:
        return f"peak {needed:.1f} GiB; choose cluster=<name> to compare it with a GPU's memory"
    share = needed / cfg.cluster.gpu_memory_gib
    text = f"peak {needed:.1f} GiB, {share:.0%} of the {cfg.cluster.gpu_memory_gib:g} GiB of {cfg.cluster.gpu_name}"
    if not _is_close(cfg, estimate):
        return text
    return f"{text}: may not fit; {_suggest(cfg, estimate)}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.3f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _suggest(cfg: RunConfig, estimate: MemoryEstimate) -> str:
    """The cheapest changes that make `cfg` fit `cluster.gpu_memory_gib`, or those that save most where none does.

    A change is offered only if the changed configuration passes every check on the same processes.
    """
    limit, world_size = (cfg.cluster.gpu_memory_gib or 0) * GIB, estimate.layout.world_size
    vocab_size = estimate.parameters.word_embeddings // cfg.model.hidden_size
    tried: list[tuple[str, float]] = []
    for section, keys in _single_changes(cfg):
        changed = replace(cfg, **{section: replace(getattr(cfg, section), **keys)})
        if not find_problems(changed, world_size):
            first, *rest = (f"{key}={_as_argument(value)}" for key, value in keys.items())
            text = f"set {section}.{first}" + (f" with {' '.join(rest)}" if rest else "")
            tried.append((text, estimate_run(changed, world_size, vocab_size).peak.total))
    fitting = [f"{text} ({needed / GIB:.1f} GiB)" for text, needed in tried if needed <= limit]
    if fitting:
        return " or ".join(fitting[:_MOST_SUGGESTIONS])
    best = sorted(tried, key=lambda item: item[1])[:_MOST_SUGGESTIONS]
    listed = ", ".join(f"{text} ({needed / GIB:.1f} GiB)" for text, needed in best)
    more = "use more processes or a smaller model"
    return f"no single change is enough: combine {listed}, or {more}" if listed else more


def _single_changes(cfg: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """A section and keys of it with other values, in the order of what they cost in speed, the cheapest first."""
    layout, experts = cfg.parallelism, cfg.model.moe is not None
    if not layout.use_distributed_optimizer:
        yield "parallelism", {"use_distributed_optimizer": True}
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        yield "parallelism", {"sequence_parallel": True}
    if cfg.trainer.micro_batch_size > 1:
        yield "trainer", {"micro_batch_size": cfg.trainer.micro_batch_size // 2}
    if layout.recompute_granularity is None:
        module = "moe" if experts else "layernorm" if cfg.model.parallel_residual else "mlp"
        yield "parallelism", {"recompute_granularity": "selective", "recompute_modules": [module]}
    if layout.recompute_granularity != "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        unused = layout.recompute_modules == UNUSED_MODULES
        yield "parallelism", full if unused else {**full, "recompute_modules": UNUSED_MODULES}
    for name in ("tensor_model", "context", "pipeline_model", *(["expert_model"] if experts else [])):
        key = f"{name}_parallel_size"
        also = {"sequence_parallel": True} if name == "tensor_model" else {}
        yield "parallelism", {key: 2 * getattr(layout, key), **also}


def _as_argument(value: object) -> str:
    return json.dumps(value, separators=(",", ":")).replace('"', "")
