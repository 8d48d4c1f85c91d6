"""Each key of the model section changes what is computed, leaves it by design, or is refused where nothing reads it."""

import dataclasses
import random
from typing import Any

import pytest

from nemo_llm.config.checks import find_problems
from nemo_llm.config.checks.effect import DEFAULTS
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.model import SCALING_FIELDS, MlaConfig, ModelConfig, MoeConfig, RopeScaling
from tests.models.key_effects import changed, effects
from tests.ranks import RankPool

# A model of `key_effects.MODELS` and another value, with which its numbers or parameters are others.
NUMBERS: dict[str, tuple[str, Any]] = {
    "num_layers": ("dense", 1),
    "hidden_size": ("dense", 64),
    "ffn_hidden_size": ("dense", 64),
    "num_attention_heads": ("dense", 8),
    "num_query_groups": ("dense", 4),
    "kv_channels": ("dense", 16),
    "vocab_size": ("dense", 1000),
    "make_vocab_size_divisible_by": ("dense", 77),
    "position_embedding_type": ("dense", "none"),
    "max_position_embeddings": ("learned", 64),
    "rotary_base": ("dense", 100.0),
    "rotary_percent": ("dense", 0.5),
    "rope_scaling": ("dense", {"type": "linear", "factor": 2.0}),
    "rotary_local_base": ("local", 10.0),
    "normalization": ("dense", "LayerNorm"),
    "layernorm_epsilon": ("dense", 0.1),
    "layernorm_zero_centered_gamma": ("dense", True),
    "norm_placement": ("dense", "both"),
    "parallel_residual": ("dense", True),
    "activation_func": ("dense", "relu"),
    "gated_linear_unit": ("dense", False),
    "add_bias_linear": ("dense", True),
    "add_qkv_bias": ("dense", True),
    "share_embeddings_and_output_weights": ("dense", False),
    "qk_layernorm": ("dense", True),
    "qk_layernorm_scope": ("normed heads", "all"),
    "hidden_dropout": ("dense", 0.3),
    "attention_dropout": ("dense", 0.3),
    "init_method_std": ("dense", 0.1),
    "depth_scaled_init": ("dense", False),
    "window_size": ("dense", 8),
    "window_attn_skip_freq": ("window", 2),
    "attn_logit_softcapping": ("dense", 0.1),
    "final_logit_softcapping": ("dense", 0.1),
    "embedding_multiplier": ("dense", 5.0),
    "softmax_scale": ("dense", 2.0),
    "moe": ("experts", None),
    "mla": (
        "latent",
        {"q_lora_rank": 8, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8},
    ),
    "mcore_overrides": ("dense", {"glu_linear_offset": 1.0}),
    "moe.num_moe_experts": ("experts", 4),
    "moe.moe_router_topk": ("experts", 3),
    "moe.moe_ffn_hidden_size": ("experts", 16),
    "moe.moe_aux_loss_coeff": ("experts", 0.5),
    "moe.moe_z_loss_coeff": ("experts", 0.1),
    "moe.moe_router_load_balancing_type": ("experts", "sinkhorn"),
    "moe.moe_router_score_function": ("experts", "sigmoid"),
    "moe.moe_router_pre_softmax": ("experts", True),
    "moe.moe_shared_expert_intermediate_size": ("experts", 16),
    "moe.moe_layer_freq": ("experts", 2),
    "moe.moe_first_k_dense_replace": ("experts", 1),
    "mla.q_lora_rank": ("latent", None),
    "mla.kv_lora_rank": ("latent", 8),
    "mla.qk_head_dim": ("latent", 16),
    "mla.qk_pos_emb_head_dim": ("latent", 8),
    "mla.v_head_dim": ("latent", 16),
    "rope_scaling.type": ("yarn", "llama3"),
    "rope_scaling.factor": ("yarn", 8.0),
    "rope_scaling.low_freq_factor": ("llama3", 0.5),
    "rope_scaling.high_freq_factor": ("llama3", 2.0),
    "rope_scaling.original_max_position_embeddings": ("llama3", 12),
    "rope_scaling.beta_fast": ("latent yarn", 1.5),
    "rope_scaling.beta_slow": ("latent yarn", 0.01),
    "rope_scaling.mscale": ("yarn", 4.0),
    "rope_scaling.mscale_all_dim": ("latent yarn", 4.0),
    "rope_scaling.attention_factor": ("yarn", 2.0),
}
# Other values that leave the numbers: speed, or words about the model.
ALIKE: dict[str, tuple[str, Any]] = {
    "name": ("dense", "other"),
    "moe.moe_token_dispatcher_type": ("experts", "allgather"),
    "transformer_impl": ("dense", "torch"),
    "hf_path": ("dense", "/where/the/shape/is/from"),
    "checkpoint_path": ("dense", "/where/the/shape/is/from"),
    "family": ("dense", "llama"),
}
# Keys whose effect has tests of its own: tests of tasks, of a layer of one's own, and of parity.
ELSEWHERE = {"head", "layer_spec", "layer_spec_settings", "moe.moe_grouped_gemm"}
# A model, a key that it does not read, a value and what is said.
REFUSED: list[tuple[str, str, Any, str]] = [
    ("learned", "rotary_base", 500.0, "rotary positions"),
    ("learned", "rotary_percent", 0.5, "rotary positions"),
    ("dense", "window_attn_skip_freq", 2, "model.window_size is null"),
    ("window", "window_attn_skip_freq", 1, "every layer"),
    ("dense", "rotary_local_base", 100.0, ""),
    ("dense", "qk_layernorm_scope", "all", "model.qk_layernorm=true"),
    ("latent", "kv_channels", 16, "sizes of its own"),
    ("latent", "softmax_scale", 1.0, "does not have it"),
    ("latent", "qk_layernorm", True, "does not have it"),
    ("latent", "add_qkv_bias", True, "does not have it"),
    ("latent", "attn_logit_softcapping", 1.0, "does not have it"),
    ("latent yarn", "rope_scaling.attention_factor", 2.0, "mscale"),
    ("yarn", "rope_scaling.low_freq_factor", 1.0, "not read by type yarn"),
    ("llama3", "rope_scaling.beta_fast", 1.0, "not read by type llama3"),
    ("experts", "moe.moe_first_k_dense_replace", 2, "none of the 2 layers"),
    ("sigmoid experts", "moe.moe_router_pre_softmax", True, "another kind"),
    ("sigmoid experts", "moe.moe_router_load_balancing_type", "sinkhorn", ""),
    ("dense", "layer_spec_settings", {"width": 3}, "model.layer_spec"),
]


def test_every_key_has_a_case() -> None:
    sections = {"": ModelConfig, "moe.": MoeConfig, "mla.": MlaConfig, "rope_scaling.": RopeScaling}
    keys = {prefix + field.name for prefix, section in sections.items() for field in dataclasses.fields(section)}
    assert keys == set(NUMBERS) | set(ALIKE) | ELSEWHERE
    scaling = {name for names in SCALING_FIELDS.values() for name in names}
    assert scaling | {"type", "factor"} == {field.name for field in dataclasses.fields(RopeScaling)}


@pytest.mark.parametrize("count", [24, pytest.param(None, marks=pytest.mark.slow)], ids=["drawn", "all"])
def test_keys_change_the_numbers_or_leave_them_by_design(count: int | None, ranks: RankPool) -> None:
    every = {**NUMBERS, **ALIKE}
    names = list(every) if count is None else random.Random(seed := random.randrange(10**6)).sample(list(every), count)
    if count is not None:
        print(f"drawn with seed {seed}: {', '.join(names)}")  # what pytest shows where the test fails
    cases = {key: every[key] for key in names}
    models = sorted({model for model, _ in cases.values()})
    runs: list[tuple[str, dict[str, Any]]] = [(model, {}) for model in models]
    runs += [(model, _change(key, value)) for key, (model, value) in cases.items()]
    for model, change in runs:
        problems = [one for one in find_problems(changed(model, change), 1) if one.key != "model.hf_path"]
        assert not problems, (model, change, problems)
    found = ranks.run(effects, 1, runs, 1)[0]
    before = dict(zip(models, found, strict=False))
    for (key, (model, _)), after in zip(cases.items(), found[len(models) :], strict=True):
        alike = after.numbers == before[model].numbers
        assert alike == (key in ALIKE), key


def _change(key: str, value: Any) -> dict[str, Any]:
    """The change, and what must go with it."""
    unset = dict.fromkeys(field.name for field in dataclasses.fields(RopeScaling))
    llama3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    if key == "rope_scaling":
        return {key: {**unset, **value}}
    if key == "rope_scaling.type":
        return {"rope_scaling": {**unset, **llama3, "type": value}}
    if key == "moe.moe_router_load_balancing_type":
        return {key: value, "moe.moe_aux_loss_coeff": 0.0}
    return {key: value}


@pytest.mark.parametrize(("model", "key", "value", "words"), REFUSED, ids=[f"{row[0]} {row[1]}" for row in REFUSED])
def test_keys_that_nothing_reads_are_refused(model: str, key: str, value: Any, words: str) -> None:
    assert not find_problems(changed(model, {}), 1)
    problems = find_problems(changed(model, {key: value}), 1)
    assert any(words in str(problem) for problem in problems), problems
    assert problems


def test_values_that_say_nothing_are_those_of_the_shipped_files() -> None:
    model = compose(["+model=moe_tiny"]).model
    found = {name: getattr(model.moe if name.startswith("moe_") else model, name) for name in DEFAULTS}
    assert found == DEFAULTS
