"""Small random models of every family, built by transformers from its own configuration classes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 131  # no multiple of the padding
TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A family, or a variant of one, at a small size."""

    name: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    experts: bool = False

    @property
    def is_quick(self) -> bool:
        """Whether its layouts are tried in every run: one case for each way in which models differ under TP and PP."""
        return self.name in (
            "llama tied",
            "llama rope yarn",
            "qwen3_moe",
            "deepseek_v2",
            "olmo2",
            "gemma2",
            "gpt2",
            "gpt_neox",
        )


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that a wrong tensor shows
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
ROPE = {"rope_theta": 100.0, "factor": 4.0}
TRAINED_ON_8 = {"original_max_position_embeddings": 8}
LLAMA3_ROPE = {**ROPE, **TRAINED_ON_8, "rope_type": "llama3", "low_freq_factor": 0.5, "high_freq_factor": 2.0}
DYNAMIC = {**ROPE, "rope_type": "dynamic"}
ROTATED_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
DEEPSEEK_236B = {
    **DEEPSEEK,
    "q_lora_rank": 12,
    "first_k_dense_replace": 2,
    "rope_parameters": {**ROPE, "rope_type": "yarn", **TRAINED_ON_8, "mscale": 0.707, "mscale_all_dim": 0.5},
}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 7,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 48,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _case(name: str, config_class: str, experts: bool = False, **changes: Any) -> Case:
    return Case(name, config_class, {**SMALL, **changes}, experts)


CASES = [
    _case("llama", "LlamaConfig"),
    _case("llama tied", "LlamaConfig", tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-5),
    _case("llama biases", "LlamaConfig", attention_bias=True, mlp_bias=True, head_dim=16),
    _case("llama rope llama3", "LlamaConfig", rope_parameters={**LLAMA3_ROPE}),
    _case("llama rope linear", "LlamaConfig", rope_parameters={**ROPE, "rope_type": "linear", "factor": 3.0}),
    _case("llama rope yarn", "LlamaConfig", rope_parameters={**ROPE, "rope_type": "yarn", **TRAINED_ON_8}),
    _case("llama rope dynamic", "LlamaConfig", max_position_embeddings=8, rope_parameters=DYNAMIC),
    _case("mistral", "MistralConfig", sliding_window=7),
    _case("qwen2", "Qwen2Config"),
    _case("qwen3", "Qwen3Config", head_dim=16, tie_word_embeddings=True),
    _case("mixtral", "MixtralConfig", experts=True, num_local_experts=4, sliding_window=None),
    _case("qwen3_moe", "Qwen3MoeConfig", experts=True, **QWEN_MOE),
    _case("qwen3_moe norm_topk_prob", "Qwen3MoeConfig", experts=True, norm_topk_prob=True, **QWEN_MOE),
    _case("deepseek_v2", "DeepseekV2Config", experts=True, **DEEPSEEK),
    _case("deepseek_v2 low-rank queries, yarn", "DeepseekV2Config", experts=True, **DEEPSEEK_236B),
    _case("olmo2", "Olmo2Config"),
    _case("gemma2", "Gemma2Config", head_dim=16, sliding_window=7, query_pre_attn_scalar=48, num_hidden_layers=4),
    _case("gemma3", "Gemma3TextConfig", **GEMMA3),
    _case("phi3", "Phi3Config"),
    Case("gpt2", "GPT2Config", GPT2),
    _case("gpt_neox", "GPTNeoXConfig"),
    _case("gpt_neox sequential", "GPTNeoXConfig", use_parallel_residual=False, rope_parameters=ROTATED_HALF),
    _case("starcoder2", "Starcoder2Config", sliding_window=7),
    _case("nemotron", "NemotronConfig"),
]


def make_hf_model(case: Case, folder: Path) -> Any:
    """Write the model to ``folder``; returns it. Every tensor is random, biases and norms too."""
    import transformers

    config = getattr(transformers, case.config_class)(**case.settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def batch() -> torch.Tensor:
    """Token ids [2, TOKENS + 1]."""
    return torch.randint(VOCABULARY, (2, TOKENS + 1), generator=torch.Generator().manual_seed(3))
