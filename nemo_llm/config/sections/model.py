"""The `model` section: the shape of the network, in Megatron's spelling."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.arithmetic import is_mixture
from nemo_llm.config.sections.fields import (
    DropoutFraction,
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    PathStr,
    PositiveFloat,
    PositiveInt,
    Scalar,
    Section,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the length that a model was first trained on.

    `llama3` (Llama 3.1), `linear` (arXiv:2306.15595), `yarn` (arXiv:2309.00071), `dynamic` (NTK by length). Each type
    reads its own fields and leaves the others None.
    """

    type: Literal["llama3", "linear", "yarn", "dynamic"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    mscale: PositiveFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    attention_factor: PositiveFloat | None = None


SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ),
    "dynamic": ("original_max_position_embeddings",),
    "linear": (),
}
"""What each type of scaling reads besides its factor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig(Section):
    """Mixture of experts in place of the dense MLP, in Megatron's spelling."""

    num_moe_experts: PositiveInt
    moe_router_topk: PositiveInt
    moe_ffn_hidden_size: PositiveInt
    moe_aux_loss_coeff: NonNegativeFloat
    moe_z_loss_coeff: NonNegativeFloat | None
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]
    moe_router_score_function: Literal["softmax", "sigmoid"]
    moe_router_pre_softmax: bool
    moe_token_dispatcher_type: Literal["alltoall", "allgather"]
    moe_shared_expert_intermediate_size: PositiveInt | None
    moe_layer_freq: PositiveInt
    moe_grouped_gemm: bool
    moe_first_k_dense_replace: PositiveInt | None = None

    def has_layer(self, number: int) -> bool:
        """Whether layer `number`, from 0, is a mixture."""
        return is_mixture(number, self.moe_first_k_dense_replace, self.moe_layer_freq)


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in Megatron's spelling.

    Keys and values of all heads are made from one latent vector a token; each head's queries and keys have channels
    without and with rotary positions.
    """

    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_head_dim: PositiveInt
    qk_pos_emb_head_dim: PositiveInt
    v_head_dim: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """Shape and initialisation of a GPT model."""

    name: NonEmptyStr
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    kv_channels: PositiveInt | None
    vocab_size: PositiveInt | None
    make_vocab_size_divisible_by: PositiveInt
    position_embedding_type: Literal["rope", "learned_absolute", "none"]
    max_position_embeddings: PositiveInt
    rotary_base: PositiveFloat
    rotary_percent: Fraction
    rope_scaling: RopeScaling | None
    rotary_local_base: PositiveFloat | None
    normalization: Literal["RMSNorm", "LayerNorm"]
    layernorm_epsilon: PositiveFloat
    layernorm_zero_centered_gamma: bool
    norm_placement: Literal["pre", "post", "both"]
    parallel_residual: bool
    activation_func: Literal["silu", "gelu", "gelu_tanh", "squared_relu", "relu"]
    gated_linear_unit: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    share_embeddings_and_output_weights: bool
    qk_layernorm: bool
    qk_layernorm_scope: Literal["head", "all"]
    hidden_dropout: DropoutFraction
    attention_dropout: DropoutFraction
    init_method_std: PositiveFloat
    depth_scaled_init: bool
    window_size: PositiveInt | None
    window_attn_skip_freq: PositiveInt | None
    attn_logit_softcapping: PositiveFloat | None
    final_logit_softcapping: PositiveFloat | None
    embedding_multiplier: PositiveFloat | None
    softmax_scale: PositiveFloat | None
    moe: MoeConfig | None
    transformer_impl: Literal["auto", "torch", "transformer_engine"]
    layer_spec: str | None
    layer_spec_settings: dict[str, Scalar]
    hf_path: PathStr | None
    checkpoint_path: PathStr | None
    family: str | None
    mla: MlaConfig | None = None
    head: tuple[NonEmptyStr, ...] | None = None
    """Classes of a head in place of the output layer, or one name for a score; None for a language model."""
    mcore_overrides: dict[str, Scalar]

    @property
    def head_dim(self) -> int:
        """Channels per attention head: `kv_channels`, or the hidden size divided over the heads."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def outputs(self, vocab_size: int) -> int:
        """What the model gives at each position: a number for each token, or for each class of its head."""
        return vocab_size if self.head is None else len(self.head)
