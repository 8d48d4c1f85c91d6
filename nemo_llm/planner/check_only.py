"""What ``trainer.check_only=true`` prints: layout, stages, parameters and memory; refuses what cannot fit the GPU."""

from dataclasses import replace

from nemo_llm.errors import ConfigError, Problem
from nemo_llm.planner.flops import flops_per_token
from nemo_llm.planner.memory import GIB, MemoryEstimate, PlannedRun, estimate_memory
from nemo_llm.planner.suggest import suggest


def report(run: PlannedRun) -> str:
    """The plan of a run as text.

    Raises:
        ConfigError: the run needs more memory than `cluster.gpu_memory_gib`.
    """
    setting, estimate = run.setting, estimate_memory(run)
    flops = flops_per_token(setting.model, setting.seq_length, run.padded_vocab_size)
    counted, layout = estimate.parameters, estimate.layout
    active = "" if counted.active == counted.total else f", {_millions(counted.active)} active per token"
    microbatches = layout.num_microbatches(run.global_batch_size, setting.micro_batch_size)
    text = "\n".join(
        [
            f"model {setting.model.name}: {_millions(counted.total)} parameters{active}; "
            f"vocabulary {run.padded_vocab_size} padded",
            f"FLOPs per token: {flops.causal / 1e9:.3f} G causal, {flops.full / 1e9:.3f} G full attention",
            f"layout: {layout.describe()}",
            f"step: {run.global_batch_size} samples of {setting.seq_length} tokens, "
            f"{microbatches} micro-batches of {setting.micro_batch_size} per pipeline",
            "",
            estimate.plan.table(),
            "",
            f"estimated memory per rank, GiB ({setting.precision.name})",
            estimate.table(),
        ]
    )
    check_fits(run, estimate, text)
    return f"{text}\n{_verdict(run, estimate)}"


def check_card(run: PlannedRun, card: tuple[str, float]) -> str | None:
    """Compare a run that is about to start with the GPU that it found.

    Args:
        card: name, and GiB of memory.

    Returns:
        A warning where the run may not fit; None where it does, or nothing is known of layers of the user's own.

    Raises:
        ConfigError: as for `report`, had `cluster` named this GPU.
    """
    if run.setting.model.layer_spec is not None:
        return None
    name, gib = card
    found = replace(run, cluster=replace(run.cluster, gpu_name=name, gpu_memory_gib=round(gib, 1)))
    estimate = estimate_memory(found)
    check_fits(found, estimate, f"estimated memory per rank, GiB\n{estimate.table()}")
    return _verdict(found, estimate) if _is_close(found, estimate) else None


def check_fits(run: PlannedRun, estimate: MemoryEstimate, shown: str = "") -> None:
    """Refuse a run that needs more memory than the named GPU has, were the estimate as far off as it may be.

    Args:
        shown: put before the message, so that the reader sees where the memory goes.

    Raises:
        ConfigError: naming the largest part and what makes it smaller.
    """
    available = run.cluster.gpu_memory_gib
    if available is None or not run.check_memory or estimate.peak.least <= available * GIB:
        return
    peak = estimate.peak
    largest = peak.parts()[peak.largest] / GIB
    problem = Problem(
        "cluster.gpu_memory_gib",
        available,
        f"the run needs about {peak.total / GIB:.1f} GiB per GPU, most of it for {peak.largest} ({largest:.1f} GiB)",
        f"{suggest(run)}; or go on anyway with trainer.check_memory=false",
    )
    error = ConfigError([problem])
    if shown:
        error.args = (f"{shown}\n\n{error}",)
    raise error


def _is_close(run: PlannedRun, estimate: MemoryEstimate) -> bool:
    """Whether the whole estimate, which is not refused, is above the memory of the GPU."""
    available = run.cluster.gpu_memory_gib
    return available is not None and estimate.peak.total > available * GIB


def _verdict(run: PlannedRun, estimate: MemoryEstimate) -> str:
    needed = estimate.peak.total / GIB
    if run.cluster.gpu_memory_gib is None:
        return f"peak {needed:.1f} GiB; choose cluster=<name> to compare it with a GPU's memory"
    share = needed / run.cluster.gpu_memory_gib
    text = f"peak {needed:.1f} GiB, {share:.0%} of the {run.cluster.gpu_memory_gib:g} GiB of {run.cluster.gpu_name}"
    if not _is_close(run, estimate):
        return text
    return f"{text}: may not fit; {suggest(run)}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.3f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
