"""Memory that one rank of each pipeline stage needs, in bytes, at the moment of a training step that needs most.

`RankMemory.allocated` is what PyTorch's ``torch.cuda.max_memory_allocated`` shows; docs/planner.md holds it beside
measured runs. What the driver shows on top of that is covered by an allowance: `CONTEXT_BYTES` for the CUDA context
with its loaded kernels and libraries' workspaces, `COMMUNICATOR_BYTES` for each NCCL communicator, and `RESERVE` for
memory that PyTorch's allocator holds and does not use. Evaluation and samples during training, which have no gradients
to compute, are taken to need less than a training step; checkpoints are copied to host memory.
"""

from dataclasses import dataclass

from nemo_llm.config.checks.code_paths import fused_chunk_tokens
from nemo_llm.config.sections.arithmetic import evenly_spread
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.parallel.layout import ParallelLayout
from nemo_llm.parallel.stages import PipelineStage, StagePlan, format_table, plan_stages
from nemo_llm.planner.activations import DTYPE_BYTES, boundary_bytes, gathered_bytes, layer_activations, tokens_per_rank
from nemo_llm.planner.parameters import ModelParameters, count_parameters
from nemo_llm.planner.state import StateBytes, state_bytes

GIB = 2**30
# Read off five runs on an H200 (docs/planner.md): in each 2.1 GiB between what PyTorch reserves and what the driver
# shows; reserved and unused 1 to 5% of what is allocated. The allocator gives unused blocks back when memory is short,
# so the least that was seen is counted.
CONTEXT_BYTES = 2.1 * GIB
COMMUNICATOR_BYTES = 0.2 * GIB
RESERVE = 0.01
# Of cuBLAS and cuBLASLt on Hopper, 32 MiB each, which PyTorch's allocator hands out.
_WORKSPACE_BYTES = 2**26
# How far the estimate may be above the truth: tests/planner holds measured rows within this. Expert parallelism puts as
# many tokens on the busiest rank as its router likes.
_DOUBT, _DOUBT_OF_EXPERTS = 0.04, 0.12


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage at the peak of a step.

    Attributes:
        moment: what the step does then: ``loss``, ``backward``, ``update`` or, before the first step, ``start``.
        working: what exists in that moment alone: logits, gradients in flight, a layer that is recomputed.
        allowance: what the arithmetic does not count (see the module).
        least: what the run takes at the very least, if the estimate is as far off as it may be.
        moments: activations and working bytes of every moment.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    allowance: float
    least: float
    moment: str
    moments: dict[str, float]

    @property
    def allocated(self) -> float:
        """What PyTorch allocates."""
        return self.total - self.allowance

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def largest(self) -> str:
        """Name of the largest part that a configuration can change."""
        parts = self.parts()
        return max((name for name in parts if name != "allowance"), key=lambda name: parts[name])


PARTS = ("parameters", "gradients", "optimizer", "activations", "working", "allowance")


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
        rows = [["stage", "layers", *PARTS, "total", "peak in"]]
        for rank, stage in enumerate(self.stages):
            cells = [f"{size / GIB:.2f}" for size in (*stage.parts().values(), stage.total)]
            rows.append([str(rank), str(self.plan.num_layers(rank)), *cells, stage.moment])
        return format_table(rows)


def estimate_memory(
    setting: ModelSetting, world_size: int, padded_vocab_size: int, global_batch_size: int, muon: bool
) -> MemoryEstimate:
    """Memory of every pipeline stage of a model that trains on `world_size` processes.

    Args:
        muon: whether Muon trains the layers' matrices, and not Adam.

    Raises:
        ValueError: the layout does not fit the processes, the layers or the batch (`config.checks` says so in words).
    """
    layout = ParallelLayout.from_config(setting.parallelism, world_size)
    plan = plan_stages(setting.model.num_layers, setting.parallelism)
    counted = count_parameters(setting.model, padded_vocab_size)
    num_microbatches = layout.num_microbatches(global_batch_size, setting.micro_batch_size)
    stages = []
    for pp_rank in range(layout.pp):
        chunks = plan.chunks(pp_rank)
        kept = _kept(setting, chunks, _chunks_in_flight(layout, pp_rank, num_microbatches))
        loss = loss_bytes(setting, padded_vocab_size) if any(chunk.has_loss for chunk in chunks) else 0.0
        stages.append(_rank_memory(layout, state_bytes(setting, muon, layout, chunks, counted), kept, loss))
    return MemoryEstimate(layout, plan, counted, tuple(stages))


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes of activations that are kept, and what the backward pass of a layer has beside them."""

    kept: float
    backward: float


def _rank_memory(layout: ParallelLayout, state: StateBytes, activations: _Kept, loss: float) -> RankMemory:
    """The moments of a step beside each other; the largest is the peak."""
    resident = state.gradients + state.optimizer
    moments = {
        "loss": (activations.kept, loss),
        "backward": (activations.kept, activations.backward),
        "update": (0.0, state.update),
        "start": (0.0, state.start - resident),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    kept, working = moments[moment]
    working += _WORKSPACE_BYTES
    gradients, optimizer = (0.0, 0.0) if moment == "start" else (state.gradients, state.optimizer)
    working = state.start if moment == "start" else working
    doubt = _DOUBT if layout.ep == 1 else _DOUBT_OF_EXPERTS
    used = state.parameters + gradients + optimizer + kept + working
    communicators = sum(size > 1 for size in (layout.tp, layout.cp, layout.dp, layout.pp, layout.ep))
    return RankMemory(
        parameters=state.parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        working=working,
        allowance=CONTEXT_BYTES + communicators * COMMUNICATOR_BYTES + RESERVE * used,
        least=used * (1 - doubt),
        moment=moment,
        moments={name: sum(sizes) for name, sizes in moments.items()},
    )


def _chunks_in_flight(layout: ParallelLayout, pp_rank: int, num_microbatches: int) -> float:
    """Micro-batches whose activations one chunk of this stage holds at the peak, averaged over its chunks.

    1F1B runs pp - rank forward passes ahead (arXiv:2006.09503); the interleaved schedule 2 (pp - rank - 1) +
    (vp - 1) pp + 1 chunk passes (arXiv:2104.04473, as Megatron counts them).
    """
    if layout.vp == 1:
        return float(min(num_microbatches, layout.pp - pp_rank))
    ahead = 2 * (layout.pp - pp_rank - 1) + (layout.vp - 1) * layout.pp + 1
    return min(num_microbatches * layout.vp, ahead) / layout.vp


def _kept(setting: ModelSetting, chunks: tuple[PipelineStage, ...], in_flight: float) -> _Kept:
    """Kept activations of all micro-batches in flight, and what the backward pass of one layer adds to them."""
    parallel = setting.parallelism
    full = parallel.recompute_granularity == "full"
    kept, backward = 0.0, 0.0
    for chunk in chunks:
        count = min(setting.performance.offload_activation_layers, len(chunk.layers) - 1)
        offloaded = evenly_spread(count + 1, len(chunk.layers))[:count]
        for place, number in enumerate(chunk.layers):
            whole_block = parallel.recompute_num_layers or 1
            recomputed = full and (parallel.recompute_method != "block" or place < whole_block)
            layer = layer_activations(setting, number, recomputed)
            if place in offloaded:  # in host memory by the end of the forward pass, and back when those above are free
                continue
            first_of_block = parallel.recompute_method != "uniform" or place % whole_block == 0
            kept += layer.kept if not recomputed or first_of_block else 0.0
            layers_at_once = whole_block if recomputed and parallel.recompute_method == "uniform" else 1
            again = layer.recomputed * min(layers_at_once, len(chunk.layers))
            if recomputed:
                again += boundary_bytes(setting)  # its output
            backward = max(backward, again + layer.in_flight)
    return _Kept(kept * in_flight + gathered_bytes(setting), backward)


def chunk_bytes(setting: ModelSetting, padded_vocab: int) -> float:
    """One chunk of logits of the fused projection and loss; all logits where the two are not fused."""
    tokens = tokens_per_rank(setting)
    chunk = min(tokens, fused_chunk_tokens(setting) or tokens)
    width = padded_vocab / setting.parallelism.tensor_model_parallel_size
    return chunk * width * DTYPE_BYTES[setting.precision.params_dtype]


def loss_bytes(setting: ModelSetting, padded_vocab: int) -> float:
    """Bytes beside the layers' activations while the loss is computed, at their most, on the last pipeline stage.

    The last layer's output, the final norm's (gathered too, under sequence parallelism), the gradient that the loss
    hands back for it; and the logits, or after them what autograd is given for the output matrix where the matrix is no
    embedding of the same stage.
    """
    element = DTYPE_BYTES[setting.precision.params_dtype]
    whole = tokens_per_rank(setting) * setting.model.hidden_size * element
    ends = 2 * boundary_bytes(setting) + whole + (whole if setting.parallelism.sequence_parallel else 0.0)
    if setting.model.head is not None:  # whole on every rank
        return ends + tokens_per_rank(setting) * len(setting.model.head) * (element + 8)
    announced = 0.0
    if not setting.model.share_embeddings_and_output_weights and setting.peft is None:
        announced = padded_vocab * setting.model.hidden_size * element / setting.parallelism.tensor_model_parallel_size
    return ends + max(logits_bytes(setting, padded_vocab), announced)


def logits_bytes(setting: ModelSetting, padded_vocab: int) -> float:
    """Bytes of logits and of what is made of them, at their most.

    Fused, one chunk is in memory at a time and becomes its gradient in place; under a cap three float32 copies stand
    beside it. Whole logits have two float32 copies (before and behind the softmax, then the softmax and its gradient),
    one more in their own format where the vocabulary's padding is masked, and two where they are capped.
    """
    element, capped = DTYPE_BYTES[setting.precision.params_dtype], setting.model.final_logit_softcapping is not None
    logits = chunk_bytes(setting, padded_vocab)
    if fused_chunk_tokens(setting) is not None:
        return logits * (1 + (3 * 4 / element if capped else 0))
    padded = padded_vocab != setting.model.vocab_size
    return logits * (1 + 2 * 4 / element + (1 if padded else 0) + (2 if capped else 0))
