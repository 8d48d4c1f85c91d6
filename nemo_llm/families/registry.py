"""The families that are known, and the way from ``config.json`` to the model section and back."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_llm.errors import InputError
from nemo_llm.families import deepseek, layer_norm, llama_like
from nemo_llm.families.codecs import CODECS, decode_rope, encode_rope, flattened
from nemo_llm.families.spec import Family

# Keys that a family leaves out of its tables where it has none of what they name.
_PLAIN: Mapping[str, Any] = {
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
    "rotary_local_base": None,
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
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
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
        value = config.get(field.theirs)
        if value is None:
            value = _default(field.default, config)
        if value == "REQUIRED":
            raise InputError(f"{where}: {field.theirs} is missing from config.json")
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


def _default(default: Any, config: Mapping[str, Any]) -> Any:
    """The value itself, another key's, or four times another key's."""
    if not isinstance(default, str):
        return default
    key = default.removeprefix("4 x ")
    value = config.get(key, default)
    return 4 * value if key != default and key in config else value


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
    if (again.setdefault("kv_channels", usual) or usual) == (model["kv_channels"] or usual):
        del again["kv_channels"]
    keys = set(again) | {key for key, plain in _PLAIN.items() if model.get(key, plain) != plain}
    return sorted(f"{key}={model.get(key)!r}" for key in keys if not _agree(again.get(key), model.get(key)))


def _agree(one: Any, other: Any) -> bool:
    """Equal; in a section a key that is not there equals null, as for keys that a later version added."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(one.get(key) == other.get(key) for key in {*one, *other})
    return bool(one == other)


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
    if config.get("head_dim", 0) is None:
        del config["head_dim"]
    if model["position_embedding_type"] == "rope":
        config.update(encode_rope(model, family.rotary_percent))
    return config


def _rope(family: Family, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return decode_rope(config, family.rotary_percent)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
