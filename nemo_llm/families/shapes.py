"""Shapes of our tensors as a model section decides them, without the leading axes of layers and experts."""

import re
from collections.abc import Mapping
from typing import Any

from nemo_llm.config.sections.arithmetic import padded_vocab_size


def our_shape(key: str, model: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of one slice of ``key``."""
    return _shapes(model)[re.sub(r"^decoder\.layers\.(\d+\.)?", "", key)]


def _shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, groups = model["hidden_size"], model["num_attention_heads"], model["num_query_groups"]
    channels = model["kv_channels"] or hidden // heads
    vocabulary = padded_vocab_size(model["vocab_size"], model["make_vocab_size_divisible_by"])
    whole = model["qk_layernorm_scope"] == "all"
    halves = 2 if model["gated_linear_unit"] else 1
    qkv_rows = (heads + 2 * groups) * channels
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "embedding.position_embeddings.weight": (model["max_position_embeddings"], hidden),
        "output_layer.weight": (vocabulary, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "decoder.final_layernorm.bias": (hidden,),
        "self_attention.linear_qkv.weight": (qkv_rows, hidden),
        "self_attention.linear_qkv.bias": (qkv_rows,),
        "self_attention.linear_proj.weight": (hidden, heads * channels),
        "self_attention.linear_proj.bias": (hidden,),
        "self_attention.q_layernorm.weight": (heads * channels if whole else channels,),
        "self_attention.k_layernorm.weight": (groups * channels if whole else channels,),
        "self_attention.linear_proj.post_layernorm.weight": (hidden,),
        "mlp.linear_fc2.post_layernorm.weight": (hidden,),
        **_mlp("mlp.", hidden, model["ffn_hidden_size"], halves),
    }
    if model.get("mla") is not None:
        shapes |= _latent_attention(model, model["mla"])
    for name in ("q_layernorm", "k_layernorm"):
        shapes[f"self_attention.{name}.bias"] = (channels,)
    for name in ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."):
        shapes |= {f"{name}weight": (hidden,), f"{name}bias": (hidden,)}
    if model["moe"] is not None:
        moe = model["moe"]
        shapes["mlp.router.weight"] = (moe["num_moe_experts"], hidden)
        shapes |= _mlp("mlp.experts.experts.", hidden, moe["moe_ffn_hidden_size"], halves)
        shapes |= _mlp("mlp.shared_experts.", hidden, moe["moe_shared_expert_intermediate_size"] or 0, halves)
    return shapes


def _latent_attention(model: Mapping[str, Any], mla: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    query_rows = heads * (mla["qk_head_dim"] + mla["qk_pos_emb_head_dim"])
    q_rank, kv_rank = mla["q_lora_rank"] or 0, mla["kv_lora_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "linear_q_proj.weight": (query_rows, hidden),
        "linear_q_down_proj.weight": (q_rank, hidden),
        "linear_q_up_proj.layer_norm_weight": (q_rank,),
        "linear_q_up_proj.weight": (query_rows, q_rank),
        "linear_kv_down_proj.weight": (kv_rank + mla["qk_pos_emb_head_dim"], hidden),
        "linear_kv_up_proj.layer_norm_weight": (kv_rank,),
        "linear_kv_up_proj.weight": (heads * (mla["qk_head_dim"] + mla["v_head_dim"]), kv_rank),
        "linear_proj.weight": (hidden, heads * mla["v_head_dim"]),
    }
    return {f"self_attention.{name}": shape for name, shape in shapes.items()} | {"input_layernorm.weight": (hidden,)}


def _mlp(prefix: str, hidden: int, inner: int, halves: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}linear_fc1.weight": (halves * inner, hidden),
        f"{prefix}linear_fc1.bias": (halves * inner,),
        f"{prefix}linear_fc2.weight": (hidden, inner),
        f"{prefix}linear_fc2.bias": (hidden,),
    }
