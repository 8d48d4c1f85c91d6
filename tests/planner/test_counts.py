"""Parameter counts and FLOPs against published numbers and closed forms."""

import dataclasses
from functools import cache

import pytest

from nemo_llm.config import ModelConfig
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.planner.flops import flops_per_token, matmul_weights
from nemo_llm.planner.parameters import count_parameters


@cache
def composed(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


def model_of(name: str, **changes: object) -> ModelConfig:
    return dataclasses.replace(composed(name), **changes)


@pytest.mark.parametrize(
    ("name", "vocab_size", "total"),
    [
        # Published by Meta with the weights.
        ("llama3_1b", 128256, 1_235_814_400),
        ("llama3_8b", 128256, 8_030_261_248),
        # GPT-3 closed form, with biases, LayerNorm, tied embedding and learned positions:
        # L (12 h^2 + 13 h) + (v + p) h + 2 h.
        ("gpt_126m", 50304, 12 * (12 * 768**2 + 13 * 768) + (50304 + 2048) * 768 + 2 * 768),
        ("gpt_175b", 51200, 96 * (12 * 12288**2 + 13 * 12288) + (51200 + 2048) * 12288 + 2 * 12288),
    ],
)
def test_totals(name: str, vocab_size: int, total: int) -> None:
    counted = count_parameters(model_of(name), vocab_size)
    assert counted.total == total
    assert counted.active == total


def test_improved_gpt_closed_form() -> None:
    """gpt_1b: SwiGLU without biases, LayerNorm, untied output: L (4 h^2 + 3 h f + 4 h) + 2 v h + 2 h."""
    hidden, inner, layers, vocab = 2048, 5440, 24, 50304
    expected = layers * (4 * hidden**2 + 3 * hidden * inner + 4 * hidden) + 2 * vocab * hidden + 2 * hidden
    assert count_parameters(model_of("gpt_1b"), vocab).total == expected


def test_mixture_of_experts_total_and_active() -> None:
    """moe_tiny: 4 experts, 2 per token; the router sees every expert."""
    hidden, inner, experts, layers, vocab = 192, 256, 4, 4, 2048
    attention = hidden * (6 + 2 * 2) * 32 + hidden * hidden
    expert = 3 * hidden * inner
    outside = layers * (attention + 2 * hidden + hidden * experts) + vocab * hidden + hidden
    counted = count_parameters(model_of("moe_tiny"), vocab)
    assert counted.total == outside + layers * experts * expert
    assert counted.active == outside + layers * 2 * expert


def test_experts_in_every_second_layer_and_a_shared_one() -> None:
    moe = dataclasses.replace(model_of("moe_tiny").moe, moe_layer_freq=2, moe_shared_expert_intermediate_size=64)
    counted = count_parameters(model_of("moe_tiny", moe=moe), 2048)
    assert [layer.experts > 0 for layer in counted.layers] == [True, False, True, False]
    dense, sparse = counted.layers[1], counted.layers[0]
    assert dense.split - sparse.split == 3 * 192 * (512 - 64)
    assert sparse.replicated - dense.replicated == 192 * 4


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"add_qkv_bias": True}, 4 * (6 + 2 * 2) * 32),
        ({"qk_layernorm": True}, 4 * 2 * 32),
        ({"normalization": "LayerNorm"}, (4 * 2 + 1) * 192),
        ({"share_embeddings_and_output_weights": False}, 2048 * 192),
        ({"head": ("ham", "spam", "neither")}, 3 * 192),
        ({"position_embedding_type": "learned_absolute"}, 1024 * 192),
        ({"gated_linear_unit": False}, -4 * 192 * 512),
        ({"kv_channels": 64}, 4 * 192 * 32 * (6 + 2 * 2 + 6)),
        ({"add_bias_linear": True}, 4 * ((6 + 2 * 2) * 32 + 192 + 2 * 512 + 192)),
    ],
)
def test_each_option_adds_what_it_says(changes: dict[str, object], difference: int) -> None:
    plain = count_parameters(model_of("gpt_tiny"), 2048).total
    assert count_parameters(model_of("gpt_tiny", **changes), 2048).total - plain == difference


@pytest.mark.parametrize(
    ("name", "seq_length", "causal", "full"),
    [
        # Figures recomputed from NVIDIA's published tables, in GFLOP per token.
        ("llama3_8b", 8192, 51.47, 57.91),
        ("llama3_8b", 4096, 48.25, 51.47),
        ("llama3_1b", 8192, 9.03, 10.64),
        ("llama3_1b", 4096, 8.22, 9.03),
    ],
)
def test_flops_in_both_conventions(name: str, seq_length: int, causal: float, full: float) -> None:
    flops = flops_per_token(model_of(name), seq_length, 128256)
    assert flops.causal / 1e9 == pytest.approx(causal, abs=0.005)
    assert flops.full / 1e9 == pytest.approx(full, abs=0.005)


def test_flops_are_six_per_weight_plus_attention() -> None:
    model = model_of("gpt_tiny")
    flops = flops_per_token(model, 128, 2048)
    attention = 12 * 4 * 192 * 128
    assert flops.full == 6 * matmul_weights(model, 2048) + attention
    assert flops.causal == 6 * matmul_weights(model, 2048) + attention / 2
    # Every matrix but the looked-up embedding, which is the output layer here: all parameters less the norms.
    assert matmul_weights(model, 2048) == count_parameters(model, 2048).total - (2 * 4 + 1) * 192


def test_flops_of_experts_follow_the_active_ones() -> None:
    one, two = (
        matmul_weights(model_of("moe_tiny", moe=dataclasses.replace(model_of("moe_tiny").moe, moe_router_topk=k)), 2048)
        for k in (1, 2)
    )
    assert two - one == 4 * 3 * 192 * 256


def test_window_shortens_attention() -> None:
    model = model_of("gpt_tiny")
    dense = 6 * matmul_weights(model, 2048)
    windowed = flops_per_token(dataclasses.replace(model, window_size=32), 128, 2048)
    assert windowed.full - dense == 12 * 4 * 192 * 32
    assert windowed.causal - dense == 12 * 4 * 192 * (32 - 32**2 / 256)
    assert flops_per_token(dataclasses.replace(model, window_size=500), 128, 2048) == flops_per_token(model, 128, 2048)


@pytest.mark.parametrize(("vocab", "by", "padded"), [(50257, 128, 50304), (50304, 128, 50304), (1, 64, 64)])
def test_padded_vocabulary(vocab: int, by: int, padded: int) -> None:
    assert padded_vocab_size(vocab, by) == padded
