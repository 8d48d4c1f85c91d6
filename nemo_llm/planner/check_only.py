"""What ``trainer.check_only=true`` prints: layout, stages, parameters and memory; refuses what cannot fit the GPU."""

from dataclasses import replace

from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.planner.flops import flops_per_token
from nemo_llm.planner.loss import vocabulary
from nemo_llm.planner.memory import GIB, MemoryEstimate, estimate_memory
from nemo_llm.planner.suggest import suggest


def report(cfg: RunConfig, world_size: int, tokenizer_vocab_size: int) -> str:
    """The plan of a run as text.

    Args:
        tokenizer_vocab_size: taken where `model.vocab_size` is null.

    Raises:
        ConfigError: the run needs more memory than `cluster.gpu_memory_gib`.
    """
    vocab_size = vocabulary(cfg, tokenizer_vocab_size)
    estimate = estimate_memory(cfg, world_size, vocab_size)
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
    estimate = estimate_memory(found, world_size, vocabulary(found, tokenizer_vocab_size))
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
    vocab_size = estimate.parameters.word_embeddings // cfg.model.hidden_size
    problem = Problem(
        "cluster.gpu_memory_gib",
        available,
        f"the run needs about {peak.total / GIB:.1f} GiB per GPU, most of it for {peak.largest} ({largest:.1f} GiB)",
        f"{suggest(cfg, estimate.layout.world_size, vocab_size)}; or go on anyway with trainer.check_memory=false",
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
    vocab_size = estimate.parameters.word_embeddings // cfg.model.hidden_size
    return f"{text}: may not fit; {suggest(cfg, estimate.layout.world_size, vocab_size)}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.3f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
