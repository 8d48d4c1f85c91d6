"""Families with LayerNorm and a plain MLP: GPT-2, GPT-NeoX (Pythia), StarCoder2, Nemotron."""

from nemo_llm.families.llama_like import ATTENTION, CONSTANTS, GROUPED, OUTSIDE, SHAPE, TIED, grouped, windowed
from nemo_llm.families.spec import Family, Field, Key, Rule

_LAYER = "decoder.layers."
_GPT2 = "transformer.h.{layer}."
_NEOX = "gpt_neox.layers.{layer}."
_THEIRS = "model.layers.{layer}."

_PLAIN = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "qk_layernorm": False,
    "window_size": None,
}


def _pairs(ours: str, theirs: str, transform: str = "copy", bias_transform: str = "copy") -> tuple[Rule, ...]:
    """A weight and its bias."""
    return (
        Rule(f"{ours}weight", (f"{theirs}weight",), transform),
        Rule(f"{ours}bias", (f"{theirs}bias",), bias_transform),
    )


GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    constants={**_PLAIN, "position_embedding_type": "learned_absolute", "rope_scaling": None},
    fields=(
        Field("num_layers", "n_layer"),
        Field("hidden_size", "n_embd"),
        Field("ffn_hidden_size", "n_inner", default=Key("n_embd", 4), null=Key("n_embd", 4)),
        Field("num_attention_heads", "n_head"),
        Field("num_query_groups", "n_head"),
        Field("vocab_size", "vocab_size"),
        Field("max_position_embeddings", "n_positions"),
        Field("layernorm_epsilon", "layer_norm_epsilon", "float", default=1e-5),
        Field("activation_func", "activation_function", "gelu_new", default="gelu_new"),
        Field("init_method_std", "initializer_range", "float", default=0.02),
        Field("share_embeddings_and_output_weights", "tie_word_embeddings", default=True),
    ),
    tensors=(
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",), "vocabulary"),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
        *_pairs("decoder.final_layernorm.", "transformer.ln_f."),
        OUTSIDE[2],
        *_pairs(_LAYER + "self_attention.linear_qkv.layer_norm_", _GPT2 + "ln_1."),
        *_pairs(_LAYER + "self_attention.linear_qkv.", _GPT2 + "attn.c_attn.", "transposed_stacked_qkv", "stacked_qkv"),
        *_pairs(_LAYER + "self_attention.linear_proj.", _GPT2 + "attn.c_proj.", "transpose"),
        *_pairs(_LAYER + "mlp.linear_fc1.layer_norm_", _GPT2 + "ln_2."),
        *_pairs(_LAYER + "mlp.linear_fc1.", _GPT2 + "mlp.c_fc.", "transpose"),
        *_pairs(_LAYER + "mlp.linear_fc2.", _GPT2 + "mlp.c_proj.", "transpose"),
    ),
    their_constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ignored=(".attn.bias", ".attn.masked_bias"),
)

GPT_NEOX = Family(
    name="GPT-NeoX, Pythia",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    constants={**_PLAIN, "position_embedding_type": "rope"},
    fields=(
        *(field for field in SHAPE if field.theirs not in ("head_dim", "rms_norm_eps", "hidden_act")),
        Field("num_query_groups", "num_attention_heads"),
        Field("layernorm_epsilon", "layer_norm_eps", "float", default=1e-5),
        Field("activation_func", "hidden_act", "activation", default="gelu"),
        Field("parallel_residual", "use_parallel_residual", default=True),
        TIED,
    ),
    tensors=(
        Rule("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",), "vocabulary"),
        *_pairs("decoder.final_layernorm.", "gpt_neox.final_layer_norm."),
        Rule("output_layer.weight", ("embed_out.weight",), "vocabulary", OUTSIDE[2].when),
        *_pairs(_LAYER + "self_attention.linear_qkv.layer_norm_", _NEOX + "input_layernorm."),
        # Query, key and value of a head stand together, as Megatron has them too.
        *_pairs(_LAYER + "self_attention.linear_qkv.", _NEOX + "attention.query_key_value."),
        *_pairs(_LAYER + "self_attention.linear_proj.", _NEOX + "attention.dense."),
        *_pairs(_LAYER + "mlp.linear_fc1.layer_norm_", _NEOX + "post_attention_layernorm."),
        *_pairs(_LAYER + "mlp.linear_fc1.", _NEOX + "mlp.dense_h_to_4h."),
        *_pairs(_LAYER + "mlp.linear_fc2.", _NEOX + "mlp.dense_4h_to_h."),
    ),
    their_constants={"attention_bias": True},
    rotary_base=("rotary_emb_base", 10000.0),
    rotary_percent=("rotary_pct", 0.25),
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)

_NORMS = (
    *_pairs(_LAYER + "self_attention.linear_qkv.layer_norm_", _THEIRS + "input_layernorm."),
    *_pairs(_LAYER + "mlp.linear_fc1.layer_norm_", _THEIRS + "post_attention_layernorm."),
    *_pairs("decoder.final_layernorm.", "model.norm."),
)

STARCODER2 = Family(
    name="StarCoder 2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    constants={
        **{key: value for key, value in _PLAIN.items() if key != "window_size"},
        "position_embedding_type": "rope",
    },
    fields=(
        *(f for f in SHAPE if f.theirs not in ("head_dim", "rms_norm_eps", "hidden_act", "initializer_range")),
        grouped(2),
        Field("init_method_std", "initializer_range", "float", default=0.018042),
        Field("layernorm_epsilon", "norm_epsilon", "float", default=1e-5),
        Field("activation_func", "hidden_act", "activation", default="gelu_pytorch_tanh"),
        Field("share_embeddings_and_output_weights", "tie_word_embeddings", default=True),
        windowed(None),
    ),
    tensors=(
        OUTSIDE[0],
        OUTSIDE[2],
        *_NORMS,
        *ATTENTION[:4],
        *_pairs(_LAYER + "mlp.linear_fc1.", _THEIRS + "mlp.c_fc."),
        *_pairs(_LAYER + "mlp.linear_fc2.", _THEIRS + "mlp.c_proj."),
    ),
    their_constants={"use_bias": True},
)

NEMOTRON = Family(
    name="Nemotron 3, 4",
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    constants={
        **CONSTANTS,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
    },
    fields=(
        *(field for field in SHAPE if field.theirs not in ("rms_norm_eps", "hidden_act", "initializer_range")),
        GROUPED,
        Field("init_method_std", "initializer_range", "float", default=0.0134),
        Field("layernorm_epsilon", "norm_eps", "float", default=1e-5),
        Field("activation_func", "hidden_act", "activation", default="relu2"),
        TIED,
    ),
    tensors=(
        OUTSIDE[0],
        OUTSIDE[2],
        *_NORMS,
        ATTENTION[0],
        ATTENTION[2],
        Rule(_LAYER + "mlp.linear_fc1.weight", (_THEIRS + "mlp.up_proj.weight",)),
        Rule(_LAYER + "mlp.linear_fc2.weight", (_THEIRS + "mlp.down_proj.weight",)),
    ),
    their_constants={"attention_bias": False, "mlp_bias": False},
    rotary_percent=("partial_rotary_factor", 0.5),
)
