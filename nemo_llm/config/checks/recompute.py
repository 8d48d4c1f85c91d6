"""Checks of recomputation: a setting that is accepted works, and spares memory in this model."""

from collections.abc import Callable, Iterator

from nemo_llm.config.sections.arithmetic import divisors, either
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.pipeline_layout import parse_pipeline_layout
from nemo_llm.errors import Problem

_KEY = "parallelism.recompute"
UNUSED_MODULES = ["core_attn"]
"""What ``recompute_modules`` holds where nothing reads it."""


def _has_dense_layer(model: ModelConfig) -> bool:
    return model.moe is None or not all(map(model.moe.has_layer, range(model.num_layers)))


# A part that can be recomputed: whether this model has it as a part of its own, and if not, why.
_PARTS: dict[str, tuple[Callable[[ModelConfig], bool], str]] = {
    "core_attn": (lambda _model: True, ""),
    "layernorm": (
        lambda model: model.norm_placement != "post",
        "the norms before attention and MLP are recomputed, and model.norm_placement=post has none",
    ),
    "mlp": (
        lambda model: _has_dense_layer(model) and not model.parallel_residual,
        "a dense MLP is recomputed, where it follows attention: not in layers of experts, nor with parallel_residual",
    ),
    "mla_up_proj": (lambda model: model.mla is not None, "is a part of latent attention, and the model has none"),
    "moe": (lambda model: model.moe is not None, "is recomputed in a mixture of experts, and the model has none"),
    "moe_act": (
        lambda model: (
            model.moe is not None and model.moe.moe_grouped_gemm and model.transformer_impl == "transformer_engine"
        ),
        "is recomputed in Transformer Engine's grouped product of experts: needs moe_grouped_gemm and "
        "transformer_impl=transformer_engine (the torch layers keep no activation of experts in any case)",
    ),
    "shared_experts": (
        lambda model: model.moe is not None and model.moe.moe_shared_expert_intermediate_size is not None,
        "are recomputed in a mixture of experts that has some (moe_shared_expert_intermediate_size)",
    ),
}
_INSIDE = {"moe_act": "moe", "shared_experts": "moe"}
"""A part that another one holds: recomputing that one recomputes it."""


def check_recompute(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Full recomputation says how and how much; selective recomputation says what."""
    parallel = setting.parallelism
    full = parallel.recompute_granularity == "full"
    if full:
        yield from _full(setting)
    for name in ("method", "num_layers"):
        value = parallel.recompute_method if name == "method" else parallel.recompute_num_layers
        if value is not None and not full:
            rule = f"is read with {_KEY}_granularity=full alone, which is {parallel.recompute_granularity}"
            yield Problem(f"{_KEY}_{name}", value, rule, f"set {_KEY}_{name}=null, or {_KEY}_granularity=full")
    if parallel.recompute_granularity == "selective":
        yield from _selective(setting)
    elif parallel.recompute_modules != UNUSED_MODULES:
        rule = f"is read with {_KEY}_granularity=selective alone, which is {parallel.recompute_granularity}"
        fix = f"set {_KEY}_granularity=selective, or {_KEY}_modules=[{','.join(UNUSED_MODULES)}]"
        yield Problem(f"{_KEY}_modules", parallel.recompute_modules, rule, fix)


def _full(setting: ModelSetting) -> Iterator[Problem]:
    parallel = setting.parallelism
    if parallel.recompute_method is None:
        rule = "full recomputation needs uniform or block"
        yield Problem(f"{_KEY}_method", None, rule, f"set {_KEY}_method=uniform")
    count, layers = parallel.recompute_num_layers, _layers_of_chunks(setting)
    if count is None:
        rule = "full recomputation needs the number of layers"
        yield Problem(f"{_KEY}_num_layers", None, rule, f"set {_KEY}_num_layers=1")
    elif layers and parallel.recompute_method == "block" and count > max(layers):
        rule = f"is more than the {max(layers)} layers of a pipeline stage or chunk"
        yield Problem(f"{_KEY}_num_layers", count, rule, f"set a number from 1 to {max(layers)}")
    elif layers and parallel.recompute_method == "uniform" and any(number % count for number in layers):
        held = either(sorted(set(layers)))
        rule = f"blocks of as many layers must fill each pipeline stage or chunk, and these have {held} layers"
        fitting = [size for size in divisors(max(layers)) if not any(number % size for number in layers)]
        yield Problem(f"{_KEY}_num_layers", count, rule, f"set it to {either(fitting)}")


def _layers_of_chunks(setting: ModelSetting) -> list[int]:
    """Layers of each pipeline stage or chunk that has some; none where the layout is wrong, which is said elsewhere."""
    parallel = setting.parallelism
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if parallel.pipeline_model_parallel_layout is None:
        return [] if setting.model.num_layers % chunks else [setting.model.num_layers // chunks]
    try:
        stages = parse_pipeline_layout(parallel.pipeline_model_parallel_layout)
    except ValueError:
        return []
    return [stage.num_layers for stage in stages if stage.num_layers]


def _selective(setting: ModelSetting) -> Iterator[Problem]:
    modules = setting.parallelism.recompute_modules
    key = f"{_KEY}_modules"
    if not modules:
        rule = f"{_KEY}_granularity=selective recomputes the parts that are named here"
        yield Problem(key, [], rule, f"name one of {', '.join(_PARTS)}, or set {_KEY}_granularity=null")
    fp8 = setting.precision.fp8
    for module in modules:
        if module not in _PARTS:
            yield Problem(key, module, f"must be of {', '.join(_PARTS)}", f"set {key}=[core_attn]")
            continue
        has, why_not = _PARTS[module]
        if not has(setting.model):
            yield Problem(key, module, why_not, f"leave {module} out")
        elif _INSIDE.get(module) in modules:
            rule = f"is a part of {_INSIDE[module]}, which is recomputed as a whole"
            yield Problem(key, module, rule, f"leave {module} out")
        elif module in ("layernorm", "moe_act") and fp8 is not None and fp8.fp8_recipe == "delayed":
            rule = "is not recomputed under FP8 with delayed scaling, whose scales it would change"
            yield Problem(key, module, rule, f"leave {module} out, or choose precision=fp8_tensorwise")


RECOMPUTE_CHECKS = (check_recompute,)
