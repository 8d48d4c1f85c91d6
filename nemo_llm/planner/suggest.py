"""Single changes that would make a run fit, each tried by estimating the changed run."""

from collections.abc import Iterator
from dataclasses import replace

from nemo_llm.config.checks import find_problems
from nemo_llm.config.checks.recompute import UNUSED_MODULES
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.planner.memory import GIB, estimate_memory

_MOST_SUGGESTIONS = 3


def suggest(cfg: RunConfig, world_size: int, padded_vocab_size: int) -> str:
    """The cheapest changes that make `cfg` fit `cluster.gpu_memory_gib`, or those that save most where none does.

    A change is offered only if the changed configuration passes every check on the same processes.
    """
    limit = (cfg.cluster.gpu_memory_gib or 0) * GIB
    tried: list[tuple[str, float]] = []
    for text, changed in _single_changes(cfg):
        if not find_problems(changed, world_size):
            tried.append((text, estimate_memory(changed, world_size, padded_vocab_size).peak.total))
    fitting = [f"{text} ({needed / GIB:.1f} GiB)" for text, needed in tried if needed <= limit]
    if fitting:
        return " or ".join(fitting[:_MOST_SUGGESTIONS])
    best = sorted(tried, key=lambda item: item[1])[:_MOST_SUGGESTIONS]
    listed = ", ".join(f"{text} ({needed / GIB:.1f} GiB)" for text, needed in best)
    more = "use more processes or a smaller model"
    return f"no single change is enough: combine {listed}, or {more}" if listed else more


def _single_changes(cfg: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Changes in the order of what they cost in speed, the cheapest first."""
    parallel = cfg.parallelism
    if not parallel.use_distributed_optimizer:
        changed = replace(parallel, use_distributed_optimizer=True)
        yield "set parallelism.use_distributed_optimizer=true", replace(cfg, parallelism=changed)
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        changed = replace(parallel, sequence_parallel=True)
        yield "set parallelism.sequence_parallel=true", replace(cfg, parallelism=changed)
    if cfg.trainer.micro_batch_size > 1:
        size = cfg.trainer.micro_batch_size // 2
        trainer = replace(cfg.trainer, micro_batch_size=size)
        yield f"set trainer.micro_batch_size={size}", replace(cfg, trainer=trainer)
    yield from _recomputation(cfg, parallel)
    yield from _larger_layouts(cfg, parallel)


def _recomputation(cfg: RunConfig, parallel: ParallelismConfig) -> Iterator[tuple[str, RunConfig]]:
    if parallel.recompute_granularity is None:
        alone = ["layernorm"] if cfg.model.parallel_residual else ["mlp"]
        modules = ["moe"] if cfg.model.moe is not None else alone
        changed = replace(parallel, recompute_granularity="selective", recompute_modules=modules)
        text = f"set parallelism.recompute_granularity=selective with recompute_modules=[{','.join(modules)}]"
        yield text, replace(cfg, parallelism=changed)
    if parallel.recompute_granularity != "full":
        changed = replace(parallel, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        changed = replace(changed, recompute_modules=UNUSED_MODULES)
        text = "set parallelism.recompute_granularity=full with recompute_method=uniform recompute_num_layers=1"
        if parallel.recompute_modules != UNUSED_MODULES:
            text += f" recompute_modules=[{','.join(UNUSED_MODULES)}]"
        yield text, replace(cfg, parallelism=changed)


def _larger_layouts(cfg: RunConfig, parallel: ParallelismConfig) -> Iterator[tuple[str, RunConfig]]:
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    changed = replace(parallel, tensor_model_parallel_size=2 * tp, sequence_parallel=True)
    text = f"set parallelism.tensor_model_parallel_size={2 * tp} with sequence_parallel=true"
    yield text, replace(cfg, parallelism=changed)
    changed = replace(parallel, context_parallel_size=2 * cp)
    yield f"set parallelism.context_parallel_size={2 * cp}", replace(cfg, parallelism=changed)
    changed = replace(parallel, pipeline_model_parallel_size=2 * pp)
    yield f"set parallelism.pipeline_model_parallel_size={2 * pp}", replace(cfg, parallelism=changed)
    if cfg.model.moe is not None:
        ep = 2 * parallel.expert_model_parallel_size
        changed = replace(parallel, expert_model_parallel_size=ep)
        yield f"set parallelism.expert_model_parallel_size={ep}", replace(cfg, parallelism=changed)
