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


def _case(name: str, config_class: str, experts: bool = False, **changes: Any) -> Case:
    return Case(name, config_class, {**SMALL, **changes}, experts)


CASES = [
    _case("llama", "LlamaConfig"),
    _case("llama tied", "LlamaConfig", tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-5),
    _case("llama biases", "LlamaConfig", attention_bias=True, mlp_bias=True, head_dim=16),
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
