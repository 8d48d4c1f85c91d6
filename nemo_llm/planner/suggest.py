"""Single changes that would make a run fit, each tried by estimating the changed run."""

from collections.abc import Iterator
from dataclasses import replace

from nemo_llm.config.checks.recompute import UNUSED_MODULES
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.planner.memory import GIB, PlannedRun, estimate_memory

_MOST_SUGGESTIONS = 3


def suggest(run: PlannedRun) -> str:
    """The cheapest changes that make `run` fit `cluster.gpu_memory_gib`, or those that save most where none does.

    A change is offered only if the changed configuration passes every check on the same processes.
    """
    limit = (run.cluster.gpu_memory_gib or 0) * GIB
    tried: list[tuple[str, float]] = []
    for text, changed in _single_changes(run.setting):
        if run.allows(changed):
            tried.append((text, estimate_memory(replace(run, setting=changed)).peak.total))
    fitting = [f"{text} ({needed / GIB:.1f} GiB)" for text, needed in tried if needed <= limit]
    if fitting:
        return " or ".join(fitting[:_MOST_SUGGESTIONS])
    best = sorted(tried, key=lambda item: item[1])[:_MOST_SUGGESTIONS]
    listed = ", ".join(f"{text} ({needed / GIB:.1f} GiB)" for text, needed in best)
    more = "use more processes or a smaller model"
    return f"no single change is enough: combine {listed}, or {more}" if listed else more


def _single_changes(setting: ModelSetting) -> Iterator[tuple[str, ModelSetting]]:
    """Changes in the order of what they cost in speed, the cheapest first."""
    parallel = setting.parallelism
    if not parallel.use_distributed_optimizer:
        changed = replace(parallel, use_distributed_optimizer=True)
        yield "set parallelism.use_distributed_optimizer=true", replace(setting, parallelism=changed)
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        changed = replace(parallel, sequence_parallel=True)
        yield "set parallelism.sequence_parallel=true", replace(setting, parallelism=changed)
    if setting.micro_batch_size > 1:
        size = setting.micro_batch_size // 2
        yield f"set trainer.micro_batch_size={size}", replace(setting, micro_batch_size=size)
    yield from _recomputation(setting, parallel)
    yield from _larger_layouts(setting, parallel)


def _recomputation(setting: ModelSetting, parallel: ParallelismConfig) -> Iterator[tuple[str, ModelSetting]]:
    if parallel.recompute_granularity is None:
        alone = ["layernorm"] if setting.model.parallel_residual else ["mlp"]
        modules = ["moe"] if setting.model.moe is not None else alone
        changed = replace(parallel, recompute_granularity="selective", recompute_modules=modules)
        text = f"set parallelism.recompute_granularity=selective with recompute_modules=[{','.join(modules)}]"
        yield text, replace(setting, parallelism=changed)
    if parallel.recompute_granularity != "full":
        changed = replace(parallel, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        changed = replace(changed, recompute_modules=UNUSED_MODULES)
        text = "set parallelism.recompute_granularity=full with recompute_method=uniform recompute_num_layers=1"
        if parallel.recompute_modules != UNUSED_MODULES:
            text += f" recompute_modules=[{','.join(UNUSED_MODULES)}]"
        yield text, replace(setting, parallelism=changed)


def _larger_layouts(setting: ModelSetting, parallel: ParallelismConfig) -> Iterator[tuple[str, ModelSetting]]:
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    changed = replace(parallel, tensor_model_parallel_size=2 * tp, sequence_parallel=True)
    text = f"set parallelism.tensor_model_parallel_size={2 * tp} with sequence_parallel=true"
    yield text, replace(setting, parallelism=changed)
    changed = replace(parallel, context_parallel_size=2 * cp)
    yield f"set parallelism.context_parallel_size={2 * cp}", replace(setting, parallelism=changed)
    changed = replace(parallel, pipeline_model_parallel_size=2 * pp)
    yield f"set parallelism.pipeline_model_parallel_size={2 * pp}", replace(setting, parallelism=changed)
    if setting.model.moe is not None:
        ep = 2 * parallel.expert_model_parallel_size
        changed = replace(parallel, expert_model_parallel_size=ep)
        yield f"set parallelism.expert_model_parallel_size={ep}", replace(setting, parallelism=changed)
