"""What ``trainer.check_only=true`` prints: layout, stages, parameters and memory; refuses what cannot fit the GPU."""

from nemo_llm.config.arithmetic import padded_vocab_size
from nemo_llm.config.run import RunConfig
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.planner.flops import flops_per_token
from nemo_llm.planner.memory import GIB, MemoryEstimate, estimate_memory
from nemo_llm.planner.suggest import suggest


def report(cfg: RunConfig, world_size: int, tokenizer_vocab_size: int) -> str:
    """The plan of a run as text.

    Args:
        tokenizer_vocab_size: taken where `model.vocab_size` is null.

    Raises:
        ConfigError: the run needs more memory than `cluster.gpu_memory_gib`.
    """
    known = cfg.model.vocab_size or tokenizer_vocab_size
    vocab_size = padded_vocab_size(known, cfg.model.make_vocab_size_divisible_by)
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


def check_fits(cfg: RunConfig, estimate: MemoryEstimate, shown: str = "") -> None:
    """Refuse a run that needs more memory than the named GPU has.

    Args:
        shown: put before the message, so that the reader sees where the memory goes.

    Raises:
        ConfigError: naming the largest part and what makes it smaller.
    """
    available = cfg.cluster.gpu_memory_gib
    if available is None or estimate.peak.total <= available * GIB:
        return
    peak = estimate.peak
    largest = peak.parts()[peak.largest] / GIB
    vocab_size = estimate.parameters.word_embeddings // cfg.model.hidden_size
    problem = Problem(
        "cluster.gpu_memory_gib",
        available,
        f"the run needs about {peak.total / GIB:.1f} GiB per GPU, most of it for {peak.largest} ({largest:.1f} GiB)",
        suggest(cfg, estimate.layout.world_size, vocab_size),
    )
    error = ConfigError([problem])
    if shown:
        error.args = (f"{shown}\n\n{error}",)
    raise error


def _verdict(cfg: RunConfig, estimate: MemoryEstimate) -> str:
    needed = estimate.peak.total / GIB
    if cfg.cluster.gpu_memory_gib is None:
        return f"peak {needed:.1f} GiB; choose cluster=<name> to compare it with a GPU's memory"
    share = needed / cfg.cluster.gpu_memory_gib
    return f"peak {needed:.1f} GiB, {share:.0%} of the {cfg.cluster.gpu_memory_gib:g} GiB of {cfg.cluster.gpu_name}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.3f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
