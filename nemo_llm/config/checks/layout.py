"""Checks of the parallel layout: what must divide what, and whether the processes are there."""

from collections.abc import Iterator
from importlib.util import find_spec

from nemo_llm.config.sections.arithmetic import (
    common_divisors,
    divisors,
    either,
    neighbouring_multiples,
    padded_vocab_size,
)
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.pipeline_layout import parse_pipeline_layout
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem

_TP = "parallelism.tensor_model_parallel_size"
_PP = "parallelism.pipeline_model_parallel_size"
_VPP = "parallelism.virtual_pipeline_model_parallel_size"
_CP = "parallelism.context_parallel_size"
_EP = "parallelism.expert_model_parallel_size"
_ETP = "parallelism.expert_tensor_parallel_size"
_LAYOUT = "parallelism.pipeline_model_parallel_layout"


def check_tensor_parallel(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Heads, query groups and the dense MLP are split by TP."""
    tp, model = setting.parallelism.tensor_model_parallel_size, setting.model
    split = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    fits = either(common_divisors(split.values()))
    for name, size in split.items():
        if size % tp:
            yield Problem(
                f"model.{name}",
                size,
                f"must be divisible by {_TP} = {tp}",
                f"set {_TP} to {fits}, or {name} to {either(neighbouring_multiples(size, tp))}",
            )


def check_vocabulary(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """TP splits the padded vocabulary; where the tokenizer alone knows its size, the padding has to divide."""
    tp, unit = setting.parallelism.tensor_model_parallel_size, setting.model.make_vocab_size_divisible_by
    rows = unit if setting.model.vocab_size is None else padded_vocab_size(setting.model.vocab_size, unit)
    if rows % tp:
        padded = "" if setting.model.vocab_size is None else f" (or its padded vocabulary of {rows} rows)"
        yield Problem(
            "model.make_vocab_size_divisible_by",
            unit,
            f"must be divisible by {_TP} = {tp}{padded}, which splits the vocabulary",
            f"set it to {either(neighbouring_multiples(unit, tp))}",
        )


def check_heads(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Query groups share the heads evenly, and heads share the hidden size unless `kv_channels` is given."""
    model = setting.model
    if model.num_attention_heads % model.num_query_groups:
        yield Problem(
            "model.num_query_groups",
            model.num_query_groups,
            f"must divide model.num_attention_heads = {model.num_attention_heads}",
            f"set it to {either(divisors(model.num_attention_heads))}",
        )
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield Problem(
            "model.hidden_size",
            model.hidden_size,
            f"must be divisible by model.num_attention_heads = {model.num_attention_heads} while kv_channels is null",
            f"set it to {either(neighbouring_multiples(model.hidden_size, model.num_attention_heads))}, "
            "or give model.kv_channels",
        )
    rotated = int(model.head_dim * model.rotary_percent)
    if model.position_embedding_type == "rope" and (rotated < 2 or rotated % 2):
        yield Problem(
            "model.rotary_percent",
            model.rotary_percent,
            f"leaves {rotated} of {model.head_dim} channels per head to rotate; it must be an even number above 0",
            "set model.rotary_percent=1.0 and an even number of channels per head",
        )


def check_sequence_parallel(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Sequence parallelism rides on TP, and a mixture of experts under TP needs it."""
    parallel = setting.parallelism
    key = "parallelism.sequence_parallel"
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield Problem(key, True, f"needs {_TP} above 1, which is 1", f"set {key}=false, or {_TP}=2")
    if setting.model.moe and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        rule = f"a mixture of experts with {_TP} = {parallel.tensor_model_parallel_size} needs sequence parallelism"
        yield Problem(key, False, rule, f"set {key}=true")


def check_sequence_length(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Context ranks hold two chunks each; sequence-parallel ranks split what is left."""
    parallel, length = setting.parallelism, setting.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    unit = 2 * cp if cp > 1 else 1
    if length % unit:
        yield Problem(
            "data.seq_length",
            length,
            f"must be divisible by 2 x {_CP} = {unit}",
            f"set data.seq_length to {either(neighbouring_multiples(length, unit))}",
        )
    if parallel.sequence_parallel and (length // cp) % tp:
        unit *= tp
        yield Problem(
            "data.seq_length",
            length,
            f"must be divisible by {unit}, for {_CP} = {cp} and sequence parallelism over {_TP} = {tp}",
            f"set data.seq_length to {either(neighbouring_multiples(length, unit))}",
        )
    if setting.model.position_embedding_type == "learned_absolute" and length > setting.model.max_position_embeddings:
        yield Problem(
            "data.seq_length",
            length,
            f"is beyond model.max_position_embeddings = {setting.model.max_position_embeddings} learned positions",
            f"set model.max_position_embeddings={length}, or shorten data.seq_length",
        )


def check_context_parallel(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """All-to-all context parallelism spreads the heads that TP has left."""
    parallel, model = setting.parallelism, setting.model
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    has_ring = model.transformer_impl != "torch" and find_spec("transformer_engine") is not None
    if cp > 1 and parallel.cp_comm_type == "p2p" and not has_ring:
        yield Problem(
            "parallelism.cp_comm_type",
            "p2p",
            "the ring of keys and values is Transformer Engine's, which is not installed or not chosen",
            "set parallelism.cp_comm_type=all_gather or a2a, or install the extra te",
        )
    if cp == 1 or parallel.cp_comm_type != "a2a":
        return
    # Our own attention repeats key-value heads where there are too few; Transformer Engine does not.
    names = ["num_attention_heads"] + ["num_query_groups"] * (model.transformer_impl == "transformer_engine")
    for name in names:
        heads = model.num_attention_heads if name == "num_attention_heads" else model.num_query_groups
        if heads % tp == 0 and (heads // tp) % cp:
            yield Problem(
                f"model.{name}",
                heads,
                f"a2a context parallelism needs {name} / TP = {heads // tp} divisible by {_CP} = {cp}",
                f"set {_CP} to {either(divisors(heads // tp))}, or parallelism.cp_comm_type=all_gather",
            )


def check_pipeline(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Layers share out evenly over stages and chunks, or as the layout string says."""
    parallel, layers = setting.parallelism, setting.model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    chunks = pp * (vpp or 1)
    if vpp is not None and vpp > 1 and pp == 1:
        yield Problem(_VPP, vpp, f"needs {_PP} above 1, which is 1", f"set {_VPP}=null, or {_PP}=2")
    if vpp == 1:
        yield Problem(_VPP, vpp, "one chunk per stage is the plain schedule", f"set {_VPP}=null")
    if parallel.pipeline_model_parallel_layout is not None:
        yield from _layout_string_problems(setting, chunks)
    elif layers % chunks:
        over_pp = [
            size for size in divisors(layers) if size <= layers // (vpp or 1) and layers % (size * (vpp or 1)) == 0
        ]
        yield Problem(
            "model.num_layers",
            layers,
            f"must be divisible by {_PP} x {_VPP} = {pp} x {vpp or 1} = {chunks}",
            f"set {_PP} to {either(over_pp or divisors(layers))}, num_layers to "
            f"{either(neighbouring_multiples(layers, chunks))}, or give uneven stages in {_LAYOUT}",
        )


def _layout_string_problems(setting: ModelSetting, chunks: int) -> Iterator[Problem]:
    layout, layers = setting.parallelism.pipeline_model_parallel_layout or "", setting.model.num_layers
    try:
        stages = parse_pipeline_layout(layout)
    except ValueError as error:
        yield Problem(_LAYOUT, layout, str(error), f"write for example {_even_layout(layers, chunks)!r}")
        return
    if len(stages) != chunks:
        yield Problem(
            _LAYOUT,
            layout,
            f"has {len(stages)} stages, but {_PP} x {_VPP} is {chunks}",
            f"write {chunks} stages, for example {_even_layout(layers, chunks)!r}",
        )
    if (count := sum(stage.num_layers for stage in stages)) != layers:
        yield Problem(
            _LAYOUT,
            layout,
            f"has {count} layers (t), but model.num_layers is {layers}",
            f"write {layers} layers, for example {_even_layout(layers, chunks)!r}",
        )


def _even_layout(layers: int, chunks: int) -> str:
    """A layout string for `layers`, the first stages taking what is left over."""
    base, rest = divmod(layers, chunks)
    counts = [base + (place < rest) for place in range(chunks)]
    parts = ["" if count == 0 else "t" if count == 1 else f"t*{count}" for count in counts]
    return "E" + "|".join(parts) + "L"


def check_experts(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Experts are spread by EP and split by ETP; both need a mixture of experts."""
    parallel, moe = setting.parallelism, setting.model.moe
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp_size
    if moe is None:
        if ep > 1:
            yield Problem(_EP, ep, "the model has no mixture of experts", f"set {_EP}=1, or choose +model=moe_tiny")
        if parallel.expert_tensor_parallel_size not in (None, parallel.tensor_model_parallel_size):
            value = parallel.expert_tensor_parallel_size
            yield Problem(_ETP, value, "the model has no mixture of experts", f"set {_ETP}=null")
        return
    if moe.num_moe_experts % ep:
        yield Problem(
            "model.moe.num_moe_experts",
            moe.num_moe_experts,
            f"must be divisible by {_EP} = {ep}",
            f"set {_EP} to {either(divisors(moe.num_moe_experts))}",
        )
    if moe.moe_ffn_hidden_size % etp:
        yield Problem(
            "model.moe.moe_ffn_hidden_size",
            moe.moe_ffn_hidden_size,
            f"must be divisible by the expert tensor parallel size = {etp}",
            f"set {_ETP} to {either(divisors(moe.moe_ffn_hidden_size, at_most=64))}",
        )
    shared, tp = moe.moe_shared_expert_intermediate_size, parallel.tensor_model_parallel_size
    if shared is not None and shared % tp:
        yield Problem(
            "model.moe.moe_shared_expert_intermediate_size",
            shared,
            f"must be divisible by {_TP} = {tp}",
            f"set it to {either(neighbouring_multiples(shared, tp))}",
        )
    if moe.moe_router_topk > moe.num_moe_experts:
        yield Problem(
            "model.moe.moe_router_topk",
            moe.moe_router_topk,
            f"must be at most model.moe.num_moe_experts = {moe.num_moe_experts}",
            f"set it to a number from 1 to {moe.num_moe_experts}",
        )


def check_world_size(setting: ModelSetting, world_size: int) -> Iterator[Problem]:
    """The processes that the launcher started are a multiple of what one copy of the model takes."""
    parallel = setting.parallelism
    dense = parallel.model_parallel_size
    expert = parallel.expert_tp_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    for unit, key, axes in (
        (dense, "parallelism", "tensor x context x pipeline parallel sizes"),
        (expert, _EP, "expert-tensor x expert x pipeline parallel sizes"),
    ):
        if world_size % unit:
            count = either(neighbouring_multiples(world_size, unit))
            yield Problem(
                key,
                f"{world_size} processes",
                f"must be a multiple of {unit}, the product of the {axes}",
                f"start {count} processes (torchrun --nproc-per-node, or Slurm's tasks), or choose smaller sizes; "
                "with trainer.check_only=true, trainer.devices and trainer.num_nodes say how many there would be",
            )
            break


def check_devices(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    """`trainer.devices` and `trainer.num_nodes`, where given, agree with the launcher."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if devices is not None and nodes is not None and devices * nodes != world_size:
        yield Problem(
            "trainer.devices",
            devices,
            f"times trainer.num_nodes = {nodes} is {devices * nodes}, but the launcher started {world_size} processes",
            "leave both null to take what the launcher says, or start that many processes",
        )
    elif nodes is None and devices is not None and world_size % devices:
        yield Problem(
            "trainer.devices",
            devices,
            f"does not divide the {world_size} processes that the launcher started",
            "leave it null to take what the launcher says, or start that many processes on each node",
        )
    elif devices is None and nodes is not None and world_size % nodes:
        yield Problem(
            "trainer.num_nodes",
            nodes,
            f"does not divide the {world_size} processes that the launcher started",
            "leave it null to take what the launcher says",
        )


def check_overlap(setting: ModelSetting, _world_size: int) -> Iterator[Problem]:
    """Communication can be overlapped only where there is some of the kind."""
    parallel = setting.parallelism
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield Problem(
            "parallelism.overlap_param_gather",
            True,
            "needs parallelism.use_distributed_optimizer, which is false",
            "set parallelism.use_distributed_optimizer=true, or parallelism.overlap_param_gather=false",
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem(
            "parallelism.overlap_param_gather",
            True,
            "needs parallelism.overlap_grad_reduce, which is false",
            "set parallelism.overlap_grad_reduce=true, or parallelism.overlap_param_gather=false",
        )


LAYOUT_CHECKS = (
    check_world_size,
    check_heads,
    check_tensor_parallel,
    check_vocabulary,
    check_sequence_parallel,
    check_sequence_length,
    check_context_parallel,
    check_pipeline,
    check_experts,
    check_overlap,
)
