"""Model FLOPs per token, in the two conventions that published figures use; recomputation is never counted."""

from dataclasses import dataclass

from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.planner.parameters import attention_weights, is_moe_layer

# A multiplication and an addition a weight, once forward and twice backward (arXiv:2001.08361).
_FLOPS_PER_WEIGHT = 6
# Both products of attention (QK^T and PV), a multiplication and an addition each, once forward and twice backward.
_FLOPS_PER_ATTENDED_CHANNEL = 12


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """Model FLOPs of forward and backward for one token, without recomputation.

    Attributes:
        causal: counts the half of the attention matrix that a causal mask leaves.
        full: counts all of it, as Megatron-LM's formula does (arXiv:2104.04473).
    """

    causal: float
    full: float


def matmul_weights(model: ModelConfig, padded_vocab_size: int) -> int:
    """Weights that one token is multiplied with: active matrices and the output layer; embeddings are looked up."""
    hidden, attention = model.hidden_size, attention_weights(model)
    matrices = 3 if model.gated_linear_unit else 2
    total = hidden * (model.outputs(padded_vocab_size))
    for number in range(model.num_layers):
        inner = model.ffn_hidden_size
        if model.moe is not None and is_moe_layer(model, number):
            inner = model.moe.moe_router_topk * model.moe.moe_ffn_hidden_size
            inner += model.moe.moe_shared_expert_intermediate_size or 0
            total += hidden * model.moe.num_moe_experts  # the router scores every expert
        total += attention + matrices * hidden * inner
    return total


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocab_size: int) -> FlopsPerToken:
    """FLOPs of training on one token of a sample of `seq_length` tokens.

    A sliding window shortens what is attended to; masks between documents are not counted, as they vary.
    """
    window = min(seq_length, model.window_size or seq_length)
    # A window of w over s tokens leaves w * s - w^2 / 2 of the matrix, which is s^2 / 2 without a window.
    causal_attended = window - window**2 / (2 * seq_length)
    width: float = model.head_dim
    if model.mla is not None:  # of scores and of values, which differ here
        width = (model.mla.qk_head_dim + model.mla.qk_pos_emb_head_dim + model.mla.v_head_dim) / 2
    channels = model.num_layers * model.num_attention_heads * width
    dense = _FLOPS_PER_WEIGHT * matmul_weights(model, padded_vocab_size)
    per_attended = _FLOPS_PER_ATTENDED_CHANNEL * channels
    return FlopsPerToken(causal=dense + per_attended * causal_attended, full=dense + per_attended * window)
