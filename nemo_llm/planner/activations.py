"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor.

Counts follow our own layer (nemo_llm/models) on a GPU: attention without a stored score matrix (arXiv:2205.14135),
norms that keep their input, unfused rotary positions; tests/planner compares them with a real layer. Letters: ``n``
tokens of a micro-batch on one context rank, ``h`` hidden size. Sequence parallelism divides what TP leaves whole
(arXiv:2205.05198).
"""

from dataclasses import dataclass

from nemo_llm.config.model import MlaConfig, ModelConfig, MoeConfig
from nemo_llm.config.parallelism import ParallelismConfig
from nemo_llm.config.run import RunConfig
from nemo_llm.planner.parameters import is_moe_layer

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes of one layer and one micro-batch on one rank.

    Attributes:
        kept: what lies in memory from the layer's forward to its backward pass.
        recomputed: what is made again for the backward pass, and lies there for one layer at a time.
    """

    kept: float
    recomputed: float


def tokens_per_rank(cfg: RunConfig) -> float:
    """Tokens of a micro-batch that one context-parallel rank holds."""
    return cfg.trainer.micro_batch_size * cfg.data.seq_length / cfg.parallelism.context_parallel_size


def boundary_bytes(cfg: RunConfig) -> float:
    """Bytes of one hidden state ``[n, h]`` as it passes from layer to layer (split under sequence parallelism)."""
    split = cfg.parallelism.tensor_model_parallel_size if cfg.parallelism.sequence_parallel else 1
    return tokens_per_rank(cfg) * cfg.model.hidden_size * DTYPE_BYTES[cfg.precision.params_dtype] / split


def layer_activations(cfg: RunConfig, number: int, recomputed_in_full: bool) -> LayerActivations:
    """Activations of layer `number` (from 0); with full recomputation its input alone is kept."""
    model = cfg.model
    hidden = boundary_bytes(cfg)
    attention, norms, mlp = _attention_bytes(cfg), 2 * hidden, _mlp_bytes(cfg)
    if model.moe is not None and is_moe_layer(model, number):
        mlp = _moe_bytes(cfg, model.moe)
    masks = _dropout_mask_bytes(cfg)
    inputs = 2 * hidden  # the residual stream before attention and before the MLP
    everything = inputs + norms + attention + mlp + masks
    if recomputed_in_full:
        return LayerActivations(kept=hidden, recomputed=everything - hidden)
    dropped = _selectively_recomputed(cfg, number, norms, mlp)
    return LayerActivations(kept=everything - dropped, recomputed=dropped)


def logits_bytes(cfg: RunConfig, padded_vocab_size: int) -> float:
    """Bytes of the logits and of the loss over them at their peak, on the last pipeline stage.

    The logits themselves, two float32 copies while the softmax is made (its input and its result), and the gradient
    in the format of the logits.
    """
    own_format = DTYPE_BYTES[cfg.precision.params_dtype]
    width = padded_vocab_size / cfg.parallelism.tensor_model_parallel_size
    if cfg.model.head is not None:  # whole on every rank
        width = len(cfg.model.head)
    return tokens_per_rank(cfg) * width * (own_format + 4 + 4 + (own_format if own_format < 4 else 0))


def _attention_bytes(cfg: RunConfig) -> float:
    """Queries, keys, values, the rotated copies of the first two, and the output, all split by TP."""
    model = cfg.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.mla is not None:
        return _latent_attention_bytes(cfg, model.mla)
    kept_heads = (heads + 2 * groups) + heads
    if model.position_embedding_type == "rope":
        kept_heads += heads + groups
    if model.qk_layernorm:
        kept_heads += heads + groups
    element = DTYPE_BYTES[cfg.precision.params_dtype]
    per_token = kept_heads * model.head_dim * element + heads * 4  # and one float32 log-sum-exp a head
    split = tokens_per_rank(cfg) * per_token / cfg.parallelism.tensor_model_parallel_size
    return split + (_rotary_bytes(cfg) if model.position_embedding_type == "rope" else 0.0)


def _latent_attention_bytes(cfg: RunConfig, mla: MlaConfig) -> float:
    """Latents before and behind their norm, whole on every TP rank; queries, keys (with their rotated parts and the
    joined ones), values and output, split."""
    element, heads = DTYPE_BYTES[cfg.precision.params_dtype], cfg.model.num_attention_heads
    turned, plain = mla.qk_pos_emb_head_dim, mla.qk_head_dim
    whole = 2 * (mla.kv_lora_rank + (mla.q_lora_rank or 0)) + turned
    per_head = 2 * (2 * plain + 3 * turned) + 3 * mla.v_head_dim
    split = heads * (per_head * element + 4) / cfg.parallelism.tensor_model_parallel_size
    return tokens_per_rank(cfg) * (whole * element + split)


def _rotary_bytes(cfg: RunConfig) -> float:
    """Cosines and sines for queries and for keys, the same for every sample and whole on every TP rank."""
    positions = cfg.data.seq_length / cfg.parallelism.context_parallel_size
    channels = cfg.model.head_dim * cfg.model.rotary_percent
    return 4 * positions * channels * DTYPE_BYTES[cfg.precision.params_dtype]


def mlp_widths(model: ModelConfig) -> int:
    """Tensors of the MLP's inner width that are kept: the first product (two with a gate) and the second's input.

    SwiGLU is one fused kernel; with another gate Megatron also keeps the activated half and a copy of the other.
    """
    if not model.gated_linear_unit:
        return 2
    return 3 if model.activation_func == "silu" else 5


def _mlp_bytes(cfg: RunConfig) -> float:
    element = DTYPE_BYTES[cfg.precision.params_dtype]
    width = cfg.model.ffn_hidden_size * mlp_widths(cfg.model)
    return tokens_per_rank(cfg) * width * element / cfg.parallelism.tensor_model_parallel_size


def _moe_bytes(cfg: RunConfig, moe: MoeConfig) -> float:
    """Copies of tokens on their way to and from the experts, the experts' inner tensors, the router's scores.

    Tokens are taken as spread evenly over experts; a skewed router needs more on the rank with the favourites.
    """
    parallel, element = cfg.parallelism, DTYPE_BYTES[cfg.precision.params_dtype]
    tp, expert_tp = parallel.tensor_model_parallel_size, _expert_tp(parallel)
    own_tokens = tokens_per_rank(cfg) / tp  # a mixture of experts under TP splits the sequence
    routed = own_tokens * moe.moe_router_topk * expert_tp
    inner = moe.moe_ffn_hidden_size * mlp_widths(cfg.model) / expert_tp
    experts = routed * (2 * cfg.model.hidden_size + inner) * element
    shared = (moe.moe_shared_expert_intermediate_size or 0) * mlp_widths(cfg.model)
    scores = own_tokens * moe.num_moe_experts * 4 * 2
    return experts + tokens_per_rank(cfg) * shared * element / tp + scores


def _expert_tp(parallel: ParallelismConfig) -> int:
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def _dropout_mask_bytes(cfg: RunConfig) -> float:
    """One byte an element for each of the two dropouts on the residual stream."""
    if cfg.model.hidden_dropout == 0:
        return 0.0
    return 2 * boundary_bytes(cfg) / DTYPE_BYTES[cfg.precision.params_dtype]


def _selectively_recomputed(cfg: RunConfig, number: int, norms: float, mlp: float) -> float:
    """Bytes that selective recomputation drops; the core of attention stores no score matrix that it could drop."""
    parallel = cfg.parallelism
    if parallel.recompute_granularity != "selective":
        return 0.0
    model: ModelConfig = cfg.model
    moe_layer = is_moe_layer(model, number)
    dropped = 0.0
    if "layernorm" in parallel.recompute_modules:
        dropped += norms
    if ("moe" if moe_layer else "mlp") in parallel.recompute_modules:
        dropped += mlp
    elif moe_layer and "moe_act" in parallel.recompute_modules:
        dropped += mlp / 4
    return dropped
