"""Which code a configuration runs on a GPU: rules that the model builder and the memory estimate share. No torch."""

from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.megatron.config_fields import UNFUSED_ACTIVATION

_LEAST_HEAD_SIZE = 16  # of FlexAttention: PyTorch 2.13 refuses less


def why_no_flex(setting: ModelSetting) -> str | None:
    """Why this run makes matrices of scores for its masks on CUDA too; None where FlexAttention does without."""
    model, performance = setting.model, setting.performance
    reasons = {
        "performance.flex_attention=false": not performance.flex_attention,
        "performance.compile_layers=true": performance.compile_layers,
        f"model.attention_dropout={model.attention_dropout}": model.attention_dropout > 0.0,
        "latent attention": model.mla is not None,
        f"heads of {model.head_dim} channels": model.head_dim < _LEAST_HEAD_SIZE,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def used_window(window: int | None, length: int) -> int | None:
    """A window that samples of this length leave: one that they never leave is none."""
    return None if window is None or window >= length else window


def layer_has_window(skipped: int | None, layer_number: int) -> bool:
    """Megatron's rule: with ``window_attn_skip_freq`` = k every k-th layer (from 1) attends to everything."""
    return skipped is None or layer_number % skipped != 0


def fused_chunk_tokens(setting: ModelSetting) -> int | None:
    """Chunk of the fused projection and loss, or None: fp16's loss scale is not known when it takes gradients."""
    fused = setting.performance.fused_linear_cross_entropy and setting.precision.params_dtype != "fp16"
    return setting.performance.cross_entropy_chunk_tokens if fused else None


def fuses_rope(setting: ModelSetting) -> bool:
    """Whether on CUDA the rotation is a kernel of its own, or of the split."""
    model = setting.model
    return setting.performance.fused_rope and model.position_embedding_type == "rope" and model.mla is None


def splits_qkv(setting: ModelSetting) -> bool:
    """Whether on CUDA one kernel splits the joint projection and rotates."""
    return fuses_rope(setting) and setting.performance.fused_kernels and qkv_in_one(setting.model, setting.parallelism)


def qkv_in_one(model: ModelConfig, layout: ParallelismConfig) -> bool:
    """Whether nothing stands between the joint projection and a rotation in each layer, and ranks hold whole groups."""
    groups = model.num_query_groups or model.num_attention_heads
    rotates = not model.mcore_overrides.get("no_rope_freq")
    return rotates and not model.qk_layernorm and layout.tensor_model_parallel_size <= groups


def keys_of_own_layers(model: ModelConfig) -> list[str]:
    """Keys that ask for parts which Transformer Engine's spec lacks."""
    asked = {
        "norm_placement": model.norm_placement != "pre",
        "qk_layernorm_scope": model.qk_layernorm and model.qk_layernorm_scope != "head",
        "parallel_residual": model.parallel_residual,
        "rotary_local_base": model.rotary_local_base is not None,
        "attn_logit_softcapping": model.attn_logit_softcapping is not None,
        "mla": model.mla is not None,
    }
    return [f"model.{key}" for key, wanted in asked.items() if wanted]


def keeps_tokens_here(setting: ModelSetting) -> bool:
    """Whether one rank holds all experts, each whole, so that the torch layers send no token and copy none."""
    parallel = setting.parallelism
    overrides = {"moe_expert_capacity_factor", "moe_shared_expert_overlap"} & set(setting.model.mcore_overrides)
    return parallel.expert_model_parallel_size == parallel.expert_tp_size == 1 and not overrides


# Overrides of Megatron's fields under which an expert computes something else than plain SwiGLU.
_OTHER_EXPERTS = {"moe_apply_probs_on_input", *UNFUSED_ACTIVATION}


def why_not_grouped(setting: ModelSetting) -> str | None:
    """Why the torch layers compute experts one after another; None where all experts of a rank are one product."""
    model = setting.model
    assert model.moe is not None
    overridden = sorted(_OTHER_EXPERTS & set(model.mcore_overrides))
    reasons = {
        "model.moe.moe_grouped_gemm=false": not model.moe.moe_grouped_gemm,
        "experts without SwiGLU": model.activation_func != "silu" or not model.gated_linear_unit,
        "precision.fp8": setting.precision.fp8 is not None,
        "performance.gradient_accumulation_fusion=false": not setting.performance.gradient_accumulation_fusion,
        "a width that 8 does not divide": bool(model.hidden_size % 8 or model.moe.moe_ffn_hidden_size % 8),
        f"model.mcore_overrides.{overridden and overridden[0]}": bool(overridden),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
