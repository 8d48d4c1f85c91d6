"""Llama and the families that share its names: Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE."""

from nemo_llm.families.spec import Family, Field, Rule

_LAYER = "decoder.layers."
_THEIRS = "model.layers.{layer}."

OUTSIDE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule(
        "output_layer.weight",
        ("lm_head.weight",),
        "vocabulary",
        when=("not share_embeddings_and_output_weights",),
    ),
)


def _projections(kind: str) -> tuple[str, ...]:
    return tuple(f"{_THEIRS}self_attn.{name}_proj.{kind}" for name in "qkv")


ATTENTION = (
    Rule(_LAYER + "self_attention.linear_qkv.weight", _projections("weight"), "qkv"),
    Rule(_LAYER + "self_attention.linear_qkv.bias", _projections("bias"), "qkv", when=("add_qkv_bias",)),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_THEIRS + "self_attn.o_proj.weight",)),
    Rule(_LAYER + "self_attention.linear_proj.bias", (_THEIRS + "self_attn.o_proj.bias",), when=("add_bias_linear",)),
    Rule(_LAYER + "self_attention.q_layernorm.weight", (_THEIRS + "self_attn.q_norm.weight",), when=("qk_layernorm",)),
    Rule(_LAYER + "self_attention.k_layernorm.weight", (_THEIRS + "self_attn.k_norm.weight",), when=("qk_layernorm",)),
)
PRE_NORM = Rule(_LAYER + "self_attention.linear_qkv.layer_norm_weight", (_THEIRS + "input_layernorm.weight",))
_BIASED = ("add_bias_linear",)
DENSE_MLP = (
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
        "concatenate",
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.bias",
        (_THEIRS + "mlp.gate_proj.bias", _THEIRS + "mlp.up_proj.bias"),
        "concatenate",
        when=_BIASED,
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_THEIRS + "mlp.down_proj.weight",)),
    Rule(_LAYER + "mlp.linear_fc2.bias", (_THEIRS + "mlp.down_proj.bias",), when=_BIASED),
)
PRE_MLP_NORM = Rule(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_THEIRS + "post_attention_layernorm.weight",))

SHAPE = (
    Field("num_layers", "num_hidden_layers"),
    Field("hidden_size", "hidden_size"),
    Field("ffn_hidden_size", "intermediate_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("kv_channels", "head_dim", default=None),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("layernorm_epsilon", "rms_norm_eps", "float"),
    Field("activation_func", "hidden_act", "activation", default="silu"),
    Field("init_method_std", "initializer_range", "float", default=0.02),
)
GROUPED = Field("num_query_groups", "num_key_value_heads", default="num_attention_heads")
TIED = Field("share_embeddings_and_output_weights", "tie_word_embeddings", default=False)

CONSTANTS = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "window_size": None,
}

LLAMA = Family(
    name="Llama 2/3, SmolLM2",
    model_type="llama",
    architecture="LlamaForCausalLM",
    constants={key: value for key, value in CONSTANTS.items() if key not in ("add_bias_linear", "add_qkv_bias")},
    fields=(
        *SHAPE,
        GROUPED,
        TIED,
        Field("add_bias_linear", "mlp_bias", default=False),
        Field("add_qkv_bias", "attention_bias", default=False),
    ),
    tensors=(*OUTSIDE, PRE_NORM, *ATTENTION, PRE_MLP_NORM, *DENSE_MLP),
)
