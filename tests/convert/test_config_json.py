"""``config.json`` is read as transformers reads it: its configuration classes are the reference, key by key."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from nemo_llm.config.compose.load import compose, decode, to_dict
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.errors import InputError
from nemo_llm.families import mcore
from nemo_llm.families.codecs import flattened
from nemo_llm.families.registry import FAMILIES, NOT_EXPORTED, PLAIN, family_for, hf_config, model_section
from nemo_llm.families.spec import REQUIRED, Key
from tests.convert.cases import CASES, SMALL, Case
from tests.ranks import RankPool

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")


def class_of(model_type: str) -> Any:
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]


def as_transformers_reads(config: dict[str, Any]) -> dict[str, Any]:
    """Every key that their class fills in. Gemma 3 counts its pattern under a name of its own."""
    settings = {key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"}
    return {**class_of(config["model_type"])(**settings).to_dict(), "model_type": config["model_type"]}


def both_forms(case: Case) -> Iterator[dict[str, Any]]:
    """A model's ``config.json`` as transformers 5 writes it, and with the keys of earlier versions."""
    config = getattr(transformers, case.config_class)(**case.settings).to_dict()
    yield config
    family = FAMILIES[config["model_type"]]
    section = {"kv_channels": None, "rope_scaling": None, **model_section(config, "x")}
    yield hf_config(family, section)


def sections_agree(config: dict[str, Any]) -> bool:
    """Whether a config and what transformers makes of it are the same model; True where we refuse to guess."""
    try:
        ours = model_section(config, "x")
    except InputError as error:
        return "is missing" in str(error) or "is null" in str(error) or "is not built" in str(error)
    theirs = model_section(as_transformers_reads(config), "x")
    for section in (ours, theirs):
        width = section["hidden_size"] // section["num_attention_heads"]
        section["kv_channels"] = section.get("kv_channels") or width
    assert ours == theirs
    return True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_key_that_is_missing_or_null_means_what_it_means_to_transformers(case: Case) -> None:
    for config in both_forms(case):
        family = FAMILIES[config["model_type"]]
        keys = {field.theirs for field in family.fields} | set(family.their_constants) | set(ROPE_KEYS)
        for key in sorted(keys & set(config)):
            less = {name: value for name, value in config.items() if name != key}
            assert sections_agree(less), key
            try:
                as_transformers_reads({**config, key: None})
            except Exception:  # their class does not take null here, whatever it raises
                continue
            assert sections_agree({**config, key: None}), key


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_defaults_are_those_of_their_class(family: Any) -> None:
    theirs = flattened(class_of(family.model_type)().to_dict())
    theirs |= {"rope_local_base_freq": theirs.get("rope_local_base_freq")}
    for field in family.fields:
        if field.default is REQUIRED or field.theirs not in theirs:
            continue
        expected = theirs[field.theirs]
        if isinstance(field.default, Key):
            # Either the same number as the other key's, or null, which then means the other key's.
            assert expected in (None, field.default.factor * theirs[field.default.name]), field.theirs
        elif field.default is None and field.theirs == "head_dim":
            assert expected in (None, theirs["hidden_size"] // theirs["num_attention_heads"])
        else:
            assert field.default == expected, field.theirs
    for key, value in family.their_constants.items():
        assert theirs.get(key, value) == value, key


def rope(**parameters: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SMALL, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, **parameters}


ROTARY_SETTINGS: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": True, "finetuned": True}},
    {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 64},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64},
    {"rope_parameters": {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": 70.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {}, "rope_theta": 70.0},
    {"rope_scaling": None, "rope_theta": 70.0},
]


def _our_rotations(sections: list[dict[str, Any]], length: int) -> list[torch.Tensor]:
    from nemo_llm.models.layers.rope_scaling import ScaledRotaryEmbedding, attention_factor
    from nemo_llm.parallel.runtime import own_runtime

    base = compose(["+model=gpt_tiny", "trainer.accelerator=cpu", "precision=fp32"])
    found = []
    with own_runtime(base.runtime_setting):
        for section in sections:
            sections_with = to_dict(base) | {"model": {**to_dict(base)["model"], **section, "kv_channels": 8}}
            model = decode(sections_with).model
            if model.rope_scaling is None:
                frequencies = model.rotary_base ** -(torch.arange(0, 8, 2) / 8)
                angles = torch.outer(torch.arange(length).float(), frequencies)
            else:
                angles = ScaledRotaryEmbedding(model, None).get_freqs_non_repeated(length)
            found.append(angles.cos() * attention_factor(model.rope_scaling))
    return found


def test_rotary_frequencies_are_those_of_transformers(ranks: RankPool) -> None:
    """Base, kind and numbers, by the cosines that both sides compute at a length beyond every threshold."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = 700
    configs = [rope(**settings) for settings in ROTARY_SETTINGS]
    (found,) = ranks.run(_our_rotations, 1, [model_section(config, "x") for config in configs], length)
    for config, ours in zip(configs, found, strict=True):
        read = class_of("llama")(**{key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"})
        theirs = LlamaRotaryEmbedding(read)(torch.zeros(1, 1, 8), torch.arange(length)[None])[0][0]
        assert torch.allclose(torch.cat((ours, ours), -1), theirs, atol=2e-4), config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
    ids=str,
)
def test_a_scaling_that_is_not_built_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        model_section(rope(**settings), "x")


@pytest.mark.parametrize("base", [500.0, 10000.0, 1e6])
@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 3.0}])
def test_the_rotary_base_of_gpt_neox_comes_and_goes(base: float, scaling: dict[str, Any] | None) -> None:
    old = {"model_type": "gpt_neox", **SMALL, "rotary_emb_base": base, "rotary_pct": 0.5, "rope_scaling": scaling}
    for config in (old, as_transformers_reads(old)):
        section = {"kv_channels": None, **model_section(config, "x")}
        assert (section["rotary_base"], section["rotary_percent"]) == (base, 0.5)
        read = as_transformers_reads(hf_config(FAMILIES["gpt_neox"], section))["rope_parameters"]
        assert (read["rope_theta"], read["partial_rotary_factor"]) == (base, 0.5)
        assert read["rope_type"] == ("default" if scaling is None else "linear")


def brought(family: Any) -> set[str]:
    keys = {field.ours for field in family.fields} | set(family.constants)
    if family.constants["position_embedding_type"] == "rope":
        keys |= {"rotary_base", "rotary_percent", "rope_scaling"}
    return {key.split(".")[0] for key in keys}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_every_key_of_the_model_section_is_exported_compared_or_named_as_neither(family: Any) -> None:
    keys = {field.name for field in dataclasses.fields(ModelConfig)}
    compared = {"kv_channels"}  # with the width over the heads, in every family
    # Read with rotary positions alone, and with norms of queries and keys alone, which are compared.
    idle = {"rotary_base", "rotary_percent", "rope_scaling", "qk_layernorm_scope"}
    assert keys - brought(family) - set(PLAIN) - NOT_EXPORTED - compared - idle == set()
    assert not NOT_EXPORTED & (brought(family) | set(PLAIN))


def test_every_key_of_the_model_section_has_a_field_of_megatron_or_is_refused() -> None:
    keys = {field.name for field in dataclasses.fields(ModelConfig)}
    named = {*mcore.NEEDED, *mcore.SAME, *mcore.OURS_ALONE}
    translated = {"vocab_size", "max_position_embeddings", "window_size", "rope_scaling", "moe", "qk_layernorm_scope"}
    assert keys - named - translated - NOT_EXPORTED == set()
    section = to_dict(compose(["+model=smollm2_135m"]))["model"]
    for key in mcore.OURS_ALONE:
        with pytest.raises(InputError, match=key):
            mcore.fields_of_section({**section, key: OTHER_VALUES[key]})


OTHER_VALUES: dict[str, Any] = {
    "window_attn_skip_freq": 2,
    "window_size": 9,
    "mcore_overrides": {"softmax_type": "learnable"},
    "layer_spec": "mine:layer",
    "layer_spec_settings": {"width": 3},
    "head": ["score"],
    "norm_placement": "both",
    "parallel_residual": True,
    "rotary_local_base": 100.0,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "embedding_multiplier": 3.0,
    "softmax_scale": 0.5,
    "qk_layernorm": True,
    "gated_linear_unit": False,
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "mla": {"q_lora_rank": None, "kv_lora_rank": 4, "qk_head_dim": 4, "qk_pos_emb_head_dim": 4, "v_head_dim": 4},
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_setting_that_llama_cannot_say_is_refused_by_name(key: str) -> None:
    section = to_dict(compose(["+model=smollm2_135m"]))["model"]
    section |= {"window_size": 9} if key in ("window_attn_skip_freq", "rotary_local_base") else {}
    with pytest.raises(InputError, match=key):
        family_for({**section, "family": "llama", key: OTHER_VALUES[key]})


def test_a_window_on_every_second_layer_is_no_family_with_a_window_on_all() -> None:
    section = to_dict(compose(["+model=gpt_tiny", "model.window_size=128", "model.window_attn_skip_freq=2"]))["model"]
    section["vocab_size"] = 131
    with pytest.raises(InputError, match=r"mistral \(.*window_attn_skip_freq=2"):
        family_for(section)
    assert family_for({**section, "window_attn_skip_freq": None}).model_type == "mistral"


def test_keys_of_sections_within_the_model_are_compared_too() -> None:
    section = to_dict(compose(["+model=mixtral_8x7b"]))["model"]
    for key, value in {"moe_router_pre_softmax": True, "moe_layer_freq": 2, "moe_first_k_dense_replace": 1}.items():
        with pytest.raises(InputError, match=rf"moe\.{key}={value}"):
            family_for({**section, "moe": {**section["moe"], key: value}})
