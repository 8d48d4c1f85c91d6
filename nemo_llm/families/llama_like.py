"""Llama and the families that share its names: Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE."""

from typing import Any

from nemo_llm.families.spec import Family, Field, Key, Rule

_LAYER = "decoder.layers."
_THEIRS = "model.layers.{layer}."

OUTSIDE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",), "vocabulary", when=("not share_embeddings_and_output_weights",)),
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
    Field("kv_channels", "head_dim", default=None, null=None),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("layernorm_epsilon", "rms_norm_eps", "float"),
    Field("activation_func", "hidden_act", "activation", default="silu"),
    Field("init_method_std", "initializer_range", "float", default=0.02),
)


def _without(*theirs: str) -> tuple[Field, ...]:
    return tuple(field for field in SHAPE if field.theirs not in theirs)


def grouped(default: Any) -> Field:
    """Key-value heads; null stands for as many as there are query heads."""
    return Field("num_query_groups", "num_key_value_heads", default=default, null=Key("num_attention_heads"))


def windowed(default: int | None) -> Field:
    """The window of attention; null stands for none."""
    return Field("window_size", "sliding_window", default=default, null=None)


GROUPED = grouped(Key("num_attention_heads"))
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

_QWEN_PLAIN = {"use_sliding_window": False}

MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    constants={key: value for key, value in CONSTANTS.items() if key != "window_size"},
    fields=(*SHAPE, grouped(8), TIED, windowed(4096)),
    tensors=LLAMA.tensors,
)

QWEN2 = Family(
    name="Qwen 2, 2.5",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    constants={**CONSTANTS, "add_qkv_bias": True},
    fields=(*SHAPE, grouped(32), TIED),
    tensors=LLAMA.tensors,
    their_constants=_QWEN_PLAIN,
)

QWEN3 = Family(
    name="Qwen 3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    constants={**CONSTANTS, "qk_layernorm": True, "qk_layernorm_scope": "head"},
    fields=(*_without("head_dim"), Field("kv_channels", "head_dim", default=128), grouped(32), TIED),
    tensors=LLAMA.tensors,
    their_constants={**_QWEN_PLAIN, "attention_bias": False},
)

MOE_CONSTANTS = {
    "moe.moe_z_loss_coeff": None,
    "moe.moe_router_load_balancing_type": "aux_loss",
    "moe.moe_router_score_function": "softmax",
    "moe.moe_token_dispatcher_type": "alltoall",
    "moe.moe_shared_expert_intermediate_size": None,
    "moe.moe_layer_freq": 1,
    "moe.moe_grouped_gemm": True,
}
_MOE_FIELDS = (
    Field("moe.moe_router_topk", "num_experts_per_tok"),
    Field("moe.moe_aux_loss_coeff", "router_aux_loss_coef", "float", default=0.001),
)


def expert_mlp(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Norm, router and experts of a mixture; their names, the last four below ``block``."""
    experts = _LAYER + "mlp.experts.experts."
    names = {part: f"{_THEIRS}{block}.experts.{{expert}}.{part}.weight" for part in (gate, up, down)}
    return (
        Rule(_LAYER + "pre_mlp_layernorm.weight", (_THEIRS + "post_attention_layernorm.weight",)),
        Rule(_LAYER + "mlp.router.weight", (f"{_THEIRS}{block}.gate.weight",)),
        Rule(experts + "linear_fc1.weight", (names[gate], names[up]), "concatenate"),
        Rule(experts + "linear_fc2.weight", (names[down],)),
    )


MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    constants={**MISTRAL.constants, **MOE_CONSTANTS, "moe.moe_router_pre_softmax": False},
    fields=(
        *SHAPE,
        grouped(8),
        TIED,
        windowed(None),
        *_MOE_FIELDS,
        Field("moe.num_moe_experts", "num_local_experts"),
        Field("moe.moe_ffn_hidden_size", "intermediate_size"),
    ),
    tensors=(*OUTSIDE, PRE_NORM, *ATTENTION, *expert_mlp("block_sparse_moe", "w1", "w3", "w2")),
    rotary_base=("rope_theta", 1000000.0),
)

QWEN3_MOE = Family(
    name="Qwen 3 MoE",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    constants={**QWEN3.constants, **MOE_CONSTANTS},
    fields=(
        *SHAPE,
        grouped(4),
        TIED,
        *_MOE_FIELDS,
        Field("moe.num_moe_experts", "num_experts", default=Key("num_local_experts")),
        Field("moe.moe_ffn_hidden_size", "moe_intermediate_size"),
        Field("moe.moe_router_pre_softmax", "norm_topk_prob", "not", default=False),
    ),
    tensors=(*OUTSIDE, PRE_NORM, *ATTENTION, *expert_mlp("mlp", "gate_proj", "up_proj", "down_proj")),
    their_constants={**QWEN3.their_constants, "decoder_sparse_step": 1, "mlp_only_layers": []},
)

_POST_NORMS = (
    Rule(_LAYER + "self_attention.linear_proj.post_layernorm.weight", (_THEIRS + "post_attention_layernorm.weight",)),
    Rule(_LAYER + "mlp.linear_fc2.post_layernorm.weight", (_THEIRS + "post_feedforward_layernorm.weight",)),
)

OLMO2 = Family(
    name="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    constants={**CONSTANTS, "norm_placement": "post", "qk_layernorm": True, "qk_layernorm_scope": "all"},
    fields=(*_without("head_dim"), GROUPED, TIED),
    tensors=(*OUTSIDE, *ATTENTION, *DENSE_MLP, *_POST_NORMS),
    their_constants={"attention_bias": False},
)

_GEMMA_FIELDS = (
    *_without("hidden_act", "head_dim"),
    grouped(4),
    Field("kv_channels", "head_dim", default=256),
    Field("activation_func", "hidden_activation", "activation", default="gelu_pytorch_tanh"),
    Field("share_embeddings_and_output_weights", "tie_word_embeddings", default=True),
    Field("window_size", "sliding_window", default=4096),
    Field("softmax_scale", "query_pre_attn_scalar", "inverse_root", default=256),
    Field("embedding_multiplier", "hidden_size", "root"),
)


def _softcapped(attention: float | None, final: float | None) -> tuple[Field, Field]:
    return (
        Field("attn_logit_softcapping", "attn_logit_softcapping", "float", default=attention, null=None),
        Field("final_logit_softcapping", "final_logit_softcapping", "float", default=final, null=None),
    )


GEMMA2 = Family(
    name="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    constants={
        **{key: value for key, value in CONSTANTS.items() if key != "window_size"},
        "layernorm_zero_centered_gamma": True,
        "norm_placement": "both",
        "window_attn_skip_freq": 2,
    },
    fields=(*_GEMMA_FIELDS, *_softcapped(50.0, 30.0)),
    tensors=(
        *OUTSIDE,
        PRE_NORM,
        *ATTENTION,
        Rule(PRE_MLP_NORM.ours, (_THEIRS + "pre_feedforward_layernorm.weight",)),
        *DENSE_MLP,
        *_POST_NORMS,
    ),
    their_constants={"attention_bias": False},
)

GEMMA3 = Family(
    name="Gemma 3 (text)",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    constants={
        **{key: value for key, value in GEMMA2.constants.items() if key != "window_attn_skip_freq"},
        "qk_layernorm": True,
        "qk_layernorm_scope": "head",
    },
    fields=(
        *_GEMMA_FIELDS,
        *_softcapped(None, None),
        Field("window_attn_skip_freq", "sliding_window_pattern", default=6),
        Field("rotary_local_base", "rope_local_base_freq", "float", default=10000.0),
    ),
    tensors=GEMMA2.tensors,
    their_constants={"attention_bias": False, "use_bidirectional_attention": False},
    rotary_base=("rope_theta", 1000000.0),
)

PHI3 = Family(
    name="Phi 3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    constants={key: value for key, value in CONSTANTS.items() if key != "window_size"},
    fields=(*_without("head_dim"), GROUPED, TIED, windowed(None)),
    tensors=(
        *OUTSIDE,
        PRE_NORM,
        Rule(ATTENTION[0].ours, (_THEIRS + "self_attn.qkv_proj.weight",), "stacked_qkv"),
        ATTENTION[2],
        PRE_MLP_NORM,
        Rule(DENSE_MLP[0].ours, (_THEIRS + "mlp.gate_up_proj.weight",)),
        DENSE_MLP[2],
    ),
    rotary_percent=("partial_rotary_factor", 1.0),
)
