"""Exact parameter counts of a GPT model: in all, active per token, and on each rank of a layout."""

from dataclasses import dataclass
from fractions import Fraction

from nemo_llm.config.sections.model import ModelConfig, MoeConfig


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one transformer layer, by how tensor parallelism treats them.

    Attributes:
        split: matrices and biases that TP divides among its ranks.
        replicated: norms, row-parallel biases and the router, whole on every TP rank.
        experts: all experts' matrices, divided by EP and ETP.
    """

    split: int
    replicated: int
    experts: int

    @property
    def total(self) -> int:
        """All parameters of the layer, every expert included."""
        return self.split + self.replicated + self.experts


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """Parameters of a whole model.

    Attributes:
        layers: one entry a layer.
        word_embeddings: embedding matrix, padded rows included.
        position_embeddings: learned positions, 0 without them.
        final_norm: the norm behind the last layer.
        output_layer: output matrix, 0 where it is the embedding; a head where the model has one.
        active: parameters that one token passes through (all of a dense model).
    """

    layers: tuple[LayerParameters, ...]
    word_embeddings: int
    position_embeddings: int
    final_norm: int
    output_layer: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        outside = self.word_embeddings + self.position_embeddings + self.final_norm + self.output_layer
        return outside + sum(layer.total for layer in self.layers)


def count_parameters(model: ModelConfig, padded_vocab_size: int) -> ModelParameters:
    """Parameters of `model` with an embedding of `padded_vocab_size` rows."""
    layers = tuple(count_layer(model, is_moe_layer(model, number)) for number in range(model.num_layers))
    learned = model.position_embedding_type == "learned_absolute"
    word_embeddings = padded_vocab_size * model.hidden_size
    counted = ModelParameters(
        layers=layers,
        word_embeddings=word_embeddings,
        position_embeddings=model.max_position_embeddings * model.hidden_size if learned else 0,
        final_norm=norm_parameters(model, model.hidden_size),
        output_layer=_output_parameters(model, word_embeddings),
        active=0,
    )
    if model.moe is None:
        active = counted.total
    else:
        share = Fraction(model.moe.moe_router_topk, model.moe.num_moe_experts)
        active = counted.total - sum(int(layer.experts * (1 - share)) for layer in layers)
    return ModelParameters(
        layers, word_embeddings, counted.position_embeddings, counted.final_norm, counted.output_layer, active
    )


def _output_parameters(model: ModelConfig, word_embeddings: int) -> int:
    if model.head is not None:
        return len(model.head) * model.hidden_size
    return 0 if model.share_embeddings_and_output_weights else word_embeddings


def is_moe_layer(model: ModelConfig, number: int) -> bool:
    """Whether layer `number` (from 0) is a mixture of experts."""
    return model.moe is not None and model.moe.has_layer(number)


def count_layer(model: ModelConfig, moe_layer: bool) -> LayerParameters:
    """Parameters of one layer."""
    hidden, heads, groups, channels = (
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.head_dim,
    )
    qkv_rows = (heads + 2 * groups) * channels
    split = attention_weights(model)
    replicated = 0 if model.mla is None else model.mla.kv_lora_rank + (model.mla.q_lora_rank or 0)
    replicated += (4 if model.norm_placement == "both" else 2) * norm_parameters(model, hidden)
    if model.add_bias_linear or model.add_qkv_bias:
        split += qkv_rows
    if model.add_bias_linear:
        replicated += hidden
    if model.qk_layernorm:
        if model.qk_layernorm_scope == "head":
            replicated += 2 * norm_parameters(model, channels)
        else:
            split += (heads + groups) * channels
    if moe_layer and model.moe is not None:
        shared = model.moe.moe_shared_expert_intermediate_size or 0
        split += _mlp_weights(model, shared)
        replicated += hidden * model.moe.num_moe_experts
        return LayerParameters(split, replicated, _expert_weights(model, model.moe))
    split += _mlp_weights(model, model.ffn_hidden_size)
    if model.add_bias_linear:
        split += model.ffn_hidden_size * (2 if model.gated_linear_unit else 1)
        replicated += hidden
    return LayerParameters(split, replicated, 0)


def attention_weights(model: ModelConfig) -> int:
    """Weights of the projections into and out of one layer's attention."""
    hidden, heads, mla = model.hidden_size, model.num_attention_heads, model.mla
    if mla is None:
        return hidden * (2 * heads + 2 * model.num_query_groups) * model.head_dim
    query_rows = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
    queries = hidden * query_rows if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + query_rows)
    latent = hidden * (mla.kv_lora_rank + mla.qk_pos_emb_head_dim)
    return queries + latent + heads * (mla.kv_lora_rank * (mla.qk_head_dim + mla.v_head_dim) + mla.v_head_dim * hidden)


def norm_parameters(model: ModelConfig, width: int) -> int:
    """Parameters of a norm over `width` channels: LayerNorm has a bias too."""
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _mlp_weights(model: ModelConfig, inner: int) -> int:
    return model.hidden_size * inner * (3 if model.gated_linear_unit else 2)


def _expert_weights(model: ModelConfig, moe: MoeConfig) -> int:
    return moe.num_moe_experts * _mlp_weights(model, moe.moe_ffn_hidden_size)
