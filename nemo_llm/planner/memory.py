"""Memory that one rank of each pipeline stage needs, in bytes: parameters, gradients, optimizer, activations, logits.

What the arithmetic leaves out is covered by two stated allowances: `RUNTIME_BYTES` for the CUDA context, NCCL's
buffers and libraries' workspaces, and `FRAGMENTATION` for memory that the allocator holds and cannot use.
"""

from dataclasses import dataclass, fields, replace

from nemo_llm.config.arithmetic import evenly_spread
from nemo_llm.config.run import RunConfig
from nemo_llm.parallel.layout import ParallelLayout
from nemo_llm.parallel.stages import Stage, StagePlan, format_table, plan_stages
from nemo_llm.planner.activations import DTYPE_BYTES, boundary_bytes, layer_activations, logits_bytes
from nemo_llm.planner.parameters import ModelParameters, count_parameters

GIB = 2**30
RUNTIME_BYTES = 1.5 * GIB
FRAGMENTATION = 0.03
_ADAM_MOMENTS_BYTES = 8  # two float32 moments a parameter
_MASTER_BYTES = 4  # a float32 copy of a two-byte parameter
_FP8_CACHE_BYTES = 2  # an FP8 copy of a weight and its transpose, kept from micro-batch to micro-batch


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def largest(self) -> str:
        """Name of the largest part that a configuration can change."""
        parts = self.parts()
        return max((name for name in parts if name != "runtime"), key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """One `RankMemory` a pipeline stage, and the whole model's parameter counts."""

    layout: ParallelLayout
    plan: StagePlan
    parameters: ModelParameters
    stages: tuple[RankMemory, ...]

    @property
    def peak(self) -> RankMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)

    def table(self) -> str:
        """GiB a rank by pipeline stage and part, as text."""
        names = [field.name for field in fields(RankMemory)]
        rows = [["stage", "layers", *names, "total"]]
        for rank, stage in enumerate(self.stages):
            cells = [f"{size / GIB:.2f}" for size in (*stage.parts().values(), stage.total)]
            rows.append([str(rank), str(self.plan.num_layers(rank)), *cells])
        return format_table(rows)


def estimate_memory(cfg: RunConfig, world_size: int, padded_vocab_size: int) -> MemoryEstimate:
    """Memory of every pipeline stage of `cfg` on `world_size` processes.

    Raises:
        ValueError: the layout does not fit the processes, the layers or the batch (`config.checks` says so in words).
    """
    layout = ParallelLayout.from_config(cfg.parallelism, world_size)
    plan = plan_stages(cfg.model.num_layers, cfg.parallelism)
    counted = count_parameters(cfg.model, padded_vocab_size)
    num_microbatches = layout.num_microbatches(cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size)
    stages = tuple(
        _rank_memory(
            cfg,
            layout,
            plan.chunks(pp_rank),
            counted,
            _chunks_in_flight(layout, pp_rank, num_microbatches),
            padded_vocab_size,
        )
        for pp_rank in range(layout.pp)
    )
    return MemoryEstimate(layout, plan, counted, stages)


def _rank_memory(
    cfg: RunConfig,
    layout: ParallelLayout,
    chunks: tuple[Stage, ...],
    counted: ModelParameters,
    in_flight: float,
    padded_vocab_size: int,
) -> RankMemory:
    tied = cfg.model.share_embeddings_and_output_weights and cfg.model.head is None
    dense, experts = local_parameters(layout, chunks, counted, tied)
    outside, _ = local_parameters(layout, tuple(replace(chunk, layers=range(0)) for chunk in chunks), counted, tied)
    weights = dense + experts
    element = DTYPE_BYTES[cfg.precision.params_dtype]
    parameters = weights * element
    if cfg.precision.fp8 is not None:
        parameters += weights * (_FP8_CACHE_BYTES - (element if cfg.precision.fp8.fp8_param else 0))
    gradient = 4 if cfg.precision.grad_reduce_in_fp32 or element == 4 else element
    sharded = cfg.parallelism.use_distributed_optimizer
    optimizer = _master_and_moments(cfg, dense, outside) / (layout.dp * layout.cp if sharded else 1)
    optimizer += _master_and_moments(cfg, experts, 0.0) / (layout.edp if sharded else 1)
    share = trained_share(cfg, counted)
    activations = _activation_bytes(cfg, chunks, in_flight)
    logits = logits_bytes(cfg, padded_vocab_size) if any(chunk.has_loss for chunk in chunks) else 0.0
    dynamic = activations + logits
    return RankMemory(
        parameters,
        weights * gradient * share,
        optimizer * share,
        activations,
        logits,
        RUNTIME_BYTES + FRAGMENTATION * dynamic,
    )


def trained_share(cfg: RunConfig, counted: ModelParameters) -> float:
    """Trained parameters as a share of all: 1 without `peft`.

    With it an upper bound: the largest rank (or the bottleneck) on every linear layer of every layer and expert.
    """
    peft, model = cfg.peft, cfg.model
    if peft is None:
        return 1.0
    h, q, kv = model.hidden_size, model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    attention = 2 * (h + q) + 2 * (h + kv)
    mlp = (3 if model.gated_linear_unit else 2) * (h + model.ffn_hidden_size)
    if model.moe is not None:
        mlp = max(mlp, model.moe.num_moe_experts * 3 * (h + model.moe.moe_ffn_hidden_size))
    width = max(peft.rank, *peft.ranks.values()) if peft.ranks else peft.rank
    if peft.kind not in ("lora", "dora"):
        width = max(peft.bottleneck_size, 1)
    total = sum(layer.split + layer.replicated + layer.experts for layer in counted.layers)
    return min(1.0, width * (attention + mlp) * model.num_layers / total)


def _master_and_moments(cfg: RunConfig, weights: float, outside: float) -> float:
    """Bytes of the optimizer's state for ``weights`` parameters, of which ``outside`` are not in the layers."""
    moments = _ADAM_MOMENTS_BYTES * weights
    if cfg.optim.muon is not None:  # the layers' matrices have one moment
        moments -= _ADAM_MOMENTS_BYTES / 2 * (weights - outside)
    if cfg.performance.offload_optimizer_moments:
        moments = 0.0
    return moments + (_MASTER_BYTES * weights if DTYPE_BYTES[cfg.precision.params_dtype] < 4 else 0.0)


def local_parameters(
    layout: ParallelLayout, chunks: tuple[Stage, ...], counted: ModelParameters, tied: bool
) -> tuple[float, float]:
    """Dense and expert parameters on one rank that holds `chunks`."""
    dense = experts = 0.0
    for chunk in chunks:
        for number in chunk.layers:
            layer = counted.layers[number]
            dense += layer.split / layout.tp + layer.replicated
            experts += layer.experts / (layout.ep * layout.etp)
        if chunk.has_embedding:
            dense += counted.word_embeddings / layout.tp + counted.position_embeddings
        if chunk.has_loss:
            dense += counted.final_norm + counted.output_layer / layout.tp
            if tied and not any(other.has_embedding for other in chunks):
                dense += counted.word_embeddings / layout.tp  # the last stage's own copy of the tied matrix
    return dense, experts


def _chunks_in_flight(layout: ParallelLayout, pp_rank: int, num_microbatches: int) -> float:
    """Micro-batches whose activations one chunk of this stage holds at the peak, averaged over its chunks.

    1F1B runs pp - rank forward passes ahead (arXiv:2006.09503); the interleaved schedule 2 (pp - rank - 1) +
    (vp - 1) pp + 1 chunk passes (arXiv:2104.04473, as Megatron counts them).
    """
    if layout.vp == 1:
        return float(min(num_microbatches, layout.pp - pp_rank))
    ahead = 2 * (layout.pp - pp_rank - 1) + (layout.vp - 1) * layout.pp + 1
    return min(num_microbatches * layout.vp, ahead) / layout.vp


def _activation_bytes(cfg: RunConfig, chunks: tuple[Stage, ...], in_flight: float) -> float:
    """Kept activations of all micro-batches in flight, and what the backward pass recomputes at one time."""
    parallel = cfg.parallelism
    full = parallel.recompute_granularity == "full"
    kept, working = 0.0, 0.0
    for chunk in chunks:
        count = min(cfg.performance.offload_activation_layers, len(chunk.layers) - 1)
        offloaded = evenly_spread(count + 1, len(chunk.layers))[:count]
        for place, number in enumerate(chunk.layers):
            if place in offloaded:  # on its way, one at a time
                working = max(working, layer_activations(cfg, number, False).kept)
                continue
            whole_block = parallel.recompute_num_layers or 1
            recomputed = full and (parallel.recompute_method != "block" or place < whole_block)
            layer = layer_activations(cfg, number, recomputed)
            first_of_block = parallel.recompute_method != "uniform" or place % whole_block == 0
            kept += layer.kept if not recomputed or first_of_block else 0.0
            layers_at_once = whole_block if recomputed and parallel.recompute_method == "uniform" else 1
            working = max(working, layer.recomputed * min(layers_at_once, len(chunk.layers)))
        if chunk.has_embedding:
            kept += boundary_bytes(cfg)
    return kept * in_flight + working
