"""The families that are known, and the way from ``config.json`` to the model section and back."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_llm.errors import InputError
from nemo_llm.families import deepseek, layer_norm, llama_like
from nemo_llm.families.codecs import CODECS, decode_rope, encode_rope, flattened
from nemo_llm.families.spec import REQUIRED, Family, Field, Key

# Keys that a family leaves out of its tables where it has none of what they name: they must have these values.
PLAIN: Mapping[str, Any] = {
    "moe": None,
    "mla": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_multiplier": None,
    "softmax_scale": None,
    "layer_spec": None,
    "head": None,
    "norm_placement": "pre",
    "parallel_residual": False,
    "qk_layernorm": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "rotary_local_base": None,
    "layer_spec_settings": {},
    "mcore_overrides": {},
}
# Keys that are not exported: they change training, speed or where things lie, and never what the model computes.
NOT_EXPORTED = {
    *("name", "family", "hf_path", "checkpoint_path", "transformer_impl", "make_vocab_size_divisible_by"),
    *("depth_scaled_init", "hidden_dropout", "attention_dropout", "moe.moe_grouped_gemm"),
}

FAMILIES = {
    family.model_type: family
    for family in (
        llama_like.LLAMA,
        llama_like.MISTRAL,
        llama_like.QWEN2,
        llama_like.QWEN3,
        llama_like.MIXTRAL,
        llama_like.QWEN3_MOE,
        llama_like.OLMO2,
        llama_like.GEMMA2,
        llama_like.GEMMA3,
        llama_like.PHI3,
        deepseek.DEEPSEEK_V2,
        layer_norm.GPT2,
        layer_norm.GPT_NEOX,
        layer_norm.STARCODER2,
        layer_norm.NEMOTRON,
    )
}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder.

    Raises:
        InputError: there is none, or it is no JSON mapping.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "there is no such folder" if not folder.is_dir() else "the folder holds no config.json"
        raise InputError(f"{folder}: {what}; expected a model folder as Hugging Face's libraries save it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: says no model_type; expected the config.json of a Hugging Face model")
    return config


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that ``config.json`` names.

    Raises:
        InputError: it is not among those known.
    """
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, 1)
        meant = f" (nearest: {near[0]})" if near else ""
        raise InputError(
            f"{where}: model_type {model_type!r} is no family that can be converted{meant}; known are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def model_section(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of the model section, dotted ones for the mixture, that ``config.json`` decides.

    Raises:
        InputError: an unknown family, a missing key, or a value that stands for what is not built.
    """
    family = family_of(config, where)
    for key, value in family.their_constants.items():
        if config.get(key, value) != value:
            raise InputError(f"{where}: {key}={config[key]!r} is not built; {family.name} is converted with {value!r}")
    config = flattened(config)
    for name, factors in family.products.items():
        if all(config.get(key) is not None for key in factors):
            config[name] = config[factors[0]] * config[factors[1]]
    section: dict[str, Any] = {"family": family.model_type}
    for key, value in family.constants.items():
        _put(section, key, value)
    for field in family.fields:
        value = _value(field, config, where)
        try:
            _put(section, field.ours, CODECS[field.codec].decode(value))
        except InputError as error:
            raise InputError(f"{where}: {field.theirs}: {error}") from None
    if section["position_embedding_type"] == "rope":
        section.update(_rope(family, config, where))
    _check_layer_types(config, section, where)
    return section


def _check_layer_types(config: Mapping[str, Any], section: Mapping[str, Any], where: str) -> None:
    """Layers with a window must be those that ``window_size`` and ``window_attn_skip_freq`` make."""
    given = config.get("layer_types")
    window, skip = section.get("window_size"), section.get("window_attn_skip_freq")
    windows = [window is not None and (skip is None or number % skip != 0) for number in range(1, len(given or ()) + 1)]
    if given and given != ["sliding_attention" if has else "full_attention" for has in windows]:
        raise InputError(
            f"{where}: layer_types={given} is not built: every n-th layer sees everything, the others a window"
        )


def _value(field: Field, config: Mapping[str, Any], where: str) -> Any:
    """What ``config.json`` says for a field, or what transformers takes where it says nothing.

    Raises:
        InputError: it must say it.
    """
    value = config.get(field.theirs)
    if value is not None:
        return value
    there = field.theirs in config
    value = field.null if there else field.default
    if isinstance(value, Key):
        named = config.get(value.name)
        value = REQUIRED if named is None else value.factor * named
    if value is REQUIRED:
        raise InputError(f"{where}: {field.theirs} is {'null in' if there else 'missing from'} config.json")
    return value


def family_for(model: Mapping[str, Any]) -> Family:
    """The family that a model section can be written as: the one that it names, or the first that fits.

    Raises:
        InputError: none fits; says for each what differs.
    """
    named = model["family"]
    candidates = [FAMILIES[named]] if named in FAMILIES else list(FAMILIES.values())
    reasons = []
    for family in candidates:
        differing = _differing(family, model)
        if not differing:
            return family
        reasons.append(f"{family.model_type} ({', '.join(differing)})")
    raise InputError(
        "no Hugging Face family has this model's shape. Keys that differ, by family:\n  " + "\n  ".join(reasons)
    )


def _differing(family: Family, model: Mapping[str, Any]) -> list[str]:
    """Keys of the model section that the family's ``config.json`` would not bring back."""
    try:
        again = model_section(hf_config(family, model), family.model_type)
    except (InputError, KeyError, TypeError) as error:
        return [str(error)]
    del again["family"]
    usual = model["hidden_size"] // model["num_attention_heads"]
    again["kv_channels"] = again.get("kv_channels") or usual
    mine = _flat({**PLAIN, **model, "kv_channels": model["kv_channels"] or usual})
    brought = _flat({**PLAIN, **again})
    keys = {key for key in mine | brought if key.split(".")[0] in {*again, *PLAIN}}
    keys -= _idle(model) | NOT_EXPORTED
    return sorted(f"{key}={mine.get(key)!r}" for key in keys if mine.get(key) != brought.get(key))


def _idle(model: Mapping[str, Any]) -> set[str]:
    """Keys that a model does not read as it is."""
    idle: set[str] = set()
    if model["window_size"] is None:
        idle.add("window_attn_skip_freq")
    if not model["qk_layernorm"]:
        idle.add("qk_layernorm_scope")
    if model["position_embedding_type"] != "rope":
        idle |= {"rotary_base", "rotary_percent", "rope_scaling"}
    return idle


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A section with dotted keys and without null: a key that is not there equals null, as in older sections."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _put(section: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = value


def hf_config(family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of a model section, without what belongs to the tokenizer."""
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config.update(family.their_constants)
    for field in family.fields:
        section: Any = model
        *parents, leaf = field.ours.split(".")
        for parent in parents:
            section = section[parent]
        config[field.theirs] = CODECS[field.codec].encode(section[leaf])
    for name, (first, second) in family.products.items():
        config[first] = config.pop(name) // config[second]
    if config.get("head_dim", 0) is None:  # some classes have a width of their own where the key is missing
        config["head_dim"] = model["hidden_size"] // model["num_attention_heads"]
    if model["position_embedding_type"] == "rope":
        share = family.rotary_percent
        config.update(encode_rope(model, family.rotary_base[0], None if share is None else share[0]))
    return config


def _rope(family: Family, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return decode_rope(config, family.rotary_base, family.rotary_percent)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
