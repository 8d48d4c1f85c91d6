"""Bytes that stay from step to step: weights, gradients, optimizer; and what an update and the start take on top."""

from dataclasses import dataclass, replace

from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.parallel.layout import ParallelLayout
from nemo_llm.parallel.stages import PipelineStage
from nemo_llm.planner.activations import DTYPE_BYTES, uses_transformer_engine
from nemo_llm.planner.adapters import trained_parameters
from nemo_llm.planner.parameters import ModelParameters

_ADAM_MOMENTS_BYTES = 8  # two float32 moments a parameter
_MASTER_BYTES = 4  # a float32 copy of a two-byte parameter
_TE_FP8_BYTES = 2  # Transformer Engine's FP8 copy of a weight and its transpose, kept from micro-batch to micro-batch
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # four bits; a byte a block of 64; a float32 for 256 of those
# Windows of moments on their way from and to the host (optim/host_offload.py).
_STAGING_BYTES = 3 * 2 * 4 * (1 << 25)
_MUON_ROUND = 1 << 28  # elements of matrices that are under way at once (optim/muon.py)
_MUON_BATCH = 1 << 25  # and of those that are orthogonalised together


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of one rank.

    Attributes:
        parameters: weights as they are multiplied with, adapters included.
        gradients: Megatron's buffers.
        optimizer: float32 weights and moments, staging of moments in host memory.
        update: what the optimizer's step makes and frees again.
        start: what is needed beside the parameters, before gradients and optimizer are made, and is freed again.
    """

    parameters: float
    gradients: float
    optimizer: float
    update: float
    start: float


def state_bytes(
    setting: ModelSetting,
    muon: bool,
    layout: ParallelLayout,
    chunks: tuple[PipelineStage, ...],
    counted: ModelParameters,
) -> StateBytes:
    """Bytes on a rank that holds `chunks`; `muon` is the optimizer of the layers' matrices."""
    tied = setting.model.share_embeddings_and_output_weights and setting.model.head is None
    dense, experts = local_parameters(layout, chunks, counted, tied)
    outside, _ = local_parameters(layout, tuple(replace(chunk, layers=range(0)) for chunk in chunks), counted, tied)
    element, weights = DTYPE_BYTES[setting.precision.params_dtype], dense + experts
    parameters = _weight_bytes(setting, weights, weights - outside)
    start = weights * element - parameters if setting.peft is not None else 0.0
    if setting.peft is not None:
        numbers = tuple(number for chunk in chunks for number in chunk.layers)
        dense, experts, outside = trained_parameters(setting, layout, numbers), 0.0, 0.0
        parameters += dense * element
    gradient = 4 if setting.precision.grad_reduce_in_fp32 or element == 4 else element
    sharded = setting.parallelism.use_distributed_optimizer
    share, expert_share = (layout.dp * layout.cp, layout.edp) if sharded else (1, 1)
    optimizer = _master_and_moments(setting, muon, dense, outside) / share
    optimizer += _master_and_moments(setting, muon, experts, 0.0) / expert_share
    moments = _ADAM_MOMENTS_BYTES * (dense / share + experts / expert_share)
    if setting.performance.offload_optimizer_moments:
        optimizer += min(_STAGING_BYTES, 3 * moments)
    update = 4 * (dense / share + experts / expert_share) if gradient < 4 else 0.0  # gradients in float32
    if muon:
        matrices = dense + experts - outside
        update += 2 * element * min(matrices, _MUON_ROUND) + 8 * element * min(matrices, _MUON_BATCH)
    return StateBytes(parameters, (dense + experts) * gradient, optimizer, update, max(start, 0.0))


def _weight_bytes(setting: ModelSetting, weights: float, in_layers: float) -> float:
    """Of ``weights`` parameters, of which ``in_layers`` are in the layers, whose norms count as matrices here."""
    element = DTYPE_BYTES[setting.precision.params_dtype]
    if setting.peft is not None and setting.peft.base_weights == "nf4":
        return (weights - in_layers) * element + in_layers * _NF4_BYTES
    if setting.precision.fp8 is None or not uses_transformer_engine(setting):
        return weights * element
    return weights * element + in_layers * (_TE_FP8_BYTES - (element if setting.precision.fp8.fp8_param else 0))


def _master_and_moments(setting: ModelSetting, muon: bool, weights: float, outside: float) -> float:
    """Bytes of the optimizer's state for ``weights`` parameters, of which ``outside`` are not in the layers."""
    moments = _ADAM_MOMENTS_BYTES * weights
    if muon:  # the layers' matrices have one moment
        moments -= _ADAM_MOMENTS_BYTES / 2 * (weights - outside)
    if setting.performance.offload_optimizer_moments:
        moments = 0.0
    return moments + (_MASTER_BYTES * weights if DTYPE_BYTES[setting.precision.params_dtype] < 4 else 0.0)


def local_parameters(
    layout: ParallelLayout, chunks: tuple[PipelineStage, ...], counted: ModelParameters, tied: bool
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
