"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, and mixtures with shared experts behind dense layers."""

from dataclasses import replace

from nemo_llm.families.llama_like import (
    CONSTANTS,
    DENSE_MLP,
    GROUPED,
    MOE_CONSTANTS,
    OUTSIDE,
    PRE_MLP_NORM,
    SHAPE,
    TIED,
    expert_mlp,
)
from nemo_llm.families.spec import Family, Field, Rule

_OURS = "decoder.layers.self_attention."
_THEIRS = "model.layers.{layer}.self_attn."
_SHARED = "model.layers.{layer}.mlp.shared_experts."
_OWN_MOE_KEYS = ("moe.moe_shared_expert_intermediate_size", "moe.moe_router_load_balancing_type")
_LOW_RANK, _FULL_RANK = ("mla.q_lora_rank",), ("not mla.q_lora_rank",)

DEEPSEEK_V2 = Family(
    name="DeepSeek V2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    constants={
        **CONSTANTS,
        **{key: value for key, value in MOE_CONSTANTS.items() if key not in _OWN_MOE_KEYS},
        "moe.moe_router_pre_softmax": True,
        "moe.moe_router_load_balancing_type": "seq_aux_loss",
    },
    fields=(
        *(field for field in SHAPE if field.theirs != "head_dim"),
        TIED,
        GROUPED,
        Field("mla.q_lora_rank", "q_lora_rank", default=1536, null=None),
        Field("mla.kv_lora_rank", "kv_lora_rank"),
        Field("mla.qk_head_dim", "qk_nope_head_dim"),
        Field("mla.qk_pos_emb_head_dim", "qk_rope_head_dim"),
        Field("mla.v_head_dim", "v_head_dim"),
        Field("moe.num_moe_experts", "n_routed_experts"),
        Field("moe.moe_router_topk", "num_experts_per_tok"),
        Field("moe.moe_ffn_hidden_size", "moe_intermediate_size"),
        Field("moe.moe_shared_expert_intermediate_size", "shared_intermediate_size"),
        Field("moe.moe_first_k_dense_replace", "first_k_dense_replace", "none_for_0", default=0),
        Field("moe.moe_aux_loss_coeff", "aux_loss_alpha", "float", default=0.001),
    ),
    tensors=(
        *OUTSIDE,
        Rule("decoder.layers.input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",)),
        Rule(_OURS + "linear_q_proj.weight", (_THEIRS + "q_proj.weight",), when=_FULL_RANK),
        Rule(_OURS + "linear_q_down_proj.weight", (_THEIRS + "q_a_proj.weight",), when=_LOW_RANK),
        Rule(_OURS + "linear_q_up_proj.layer_norm_weight", (_THEIRS + "q_a_layernorm.weight",), when=_LOW_RANK),
        Rule(_OURS + "linear_q_up_proj.weight", (_THEIRS + "q_b_proj.weight",), when=_LOW_RANK),
        Rule(_OURS + "linear_kv_down_proj.weight", (_THEIRS + "kv_a_proj_with_mqa.weight",)),
        Rule(_OURS + "linear_kv_up_proj.layer_norm_weight", (_THEIRS + "kv_a_layernorm.weight",)),
        Rule(_OURS + "linear_kv_up_proj.weight", (_THEIRS + "kv_b_proj.weight",)),
        Rule(_OURS + "linear_proj.weight", (_THEIRS + "o_proj.weight",)),
        *(replace(rule, layers="dense") for rule in (PRE_MLP_NORM, DENSE_MLP[0], DENSE_MLP[2])),
        *(replace(rule, layers="moe") for rule in expert_mlp("mlp", "gate_proj", "up_proj", "down_proj")),
        Rule(
            "decoder.layers.mlp.shared_experts.linear_fc1.weight",
            (_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"),
            "concatenate",
            layers="moe",
        ),
        Rule("decoder.layers.mlp.shared_experts.linear_fc2.weight", (_SHARED + "down_proj.weight",), layers="moe"),
    ),
    their_constants={
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "rms_norm_eps": 1e-6,  # that of the latent norms, which no key sets
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    },
    products={"shared_intermediate_size": ("n_shared_experts", "moe_intermediate_size")},
)
