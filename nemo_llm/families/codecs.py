"""How single values of ``config.json`` become values of the model section, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_llm.config.model import SCALING_FIELDS
from nemo_llm.errors import InputError


@dataclass(frozen=True, slots=True)
class Codec:
    """Two functions: ``decode`` takes their value to ours, ``encode`` ours to theirs."""

    decode: Callable[[Any], Any]
    encode: Callable[[Any], Any]


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
}
_THEIR_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
}


def _decode_activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {name!r} is not built; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)


CODECS: Mapping[str, Codec] = {
    "same": Codec(lambda value: value, lambda value: value),
    "float": Codec(_as_float, lambda value: value),
    "activation": Codec(_decode_activation, lambda name: _THEIR_ACTIVATIONS[name]),
    "gelu_new": Codec(_decode_activation, lambda name: "gelu_new" if name == "gelu_tanh" else _THEIR_ACTIVATIONS[name]),
    # The embedding is multiplied by the root of the width (Gemma), which another field brings back.
    "root": Codec(lambda value: value**0.5, lambda value: round(value**2)),
    "none_for_0": Codec(lambda value: value or None, lambda value: value or 0),
    "not": Codec(lambda value: not value, lambda value: not value),
    # Attention logits are multiplied by our number and divided by the root of theirs (Gemma).
    "inverse_root": Codec(lambda value: value**-0.5, lambda value: round(value**-2.0)),
}

_ROPE_FIELDS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)
_ROPE_INTEGERS = {"original_max_position_embeddings"}
_ROPE_TYPES = ("llama3", "linear", "yarn", "dynamic")


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with the keys of earlier versions in the place of what transformers 5 says by type of layer.

    Raises:
        InputError: rotary positions that are scaled in layers with a window.
    """
    flat = dict(config)
    types = config.get("layer_types") or ()
    if "full_attention" in types:
        flat.setdefault("sliding_window_pattern", types.index("full_attention") + 1)
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested:
        far, near = dict(nested["full_attention"]), nested["sliding_attention"]
        if near.get("rope_type", "default") != "default":
            raise InputError(f"rope_parameters: {near} in layers with a window is not built")
        flat |= {"rope_parameters": None, "rope_theta": far.pop("rope_theta"), "rope_scaling": far}
        flat["rope_local_base_freq"] = near["rope_theta"]
    return flat


def decode_rope(config: Mapping[str, Any], percent: tuple[str, float] | None) -> dict[str, Any]:
    """``rotary_base``, ``rotary_percent`` and ``rope_scaling`` of the model section.

    transformers 5 writes ``rope_parameters``; earlier versions ``rope_theta`` and ``rope_scaling``.

    Raises:
        InputError: a way of scaling that is not known.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    share = 1.0
    if percent is not None:
        share = parameters.pop("partial_rotary_factor", None) or config.get(percent[0]) or percent[1]
    found: dict[str, Any] = {"rotary_base": float(base), "rotary_percent": float(share), "rope_scaling": None}
    if kind == "default":
        return found
    if kind not in _ROPE_TYPES:
        raise InputError(
            f"rope_scaling: type {kind!r} is not known; known are {', '.join(_ROPE_TYPES)}. A model converted without "
            "its scaling would be another model"
        )
    unknown = sorted(name for name, value in parameters.items() if name not in _ROPE_FIELDS and value is not None)
    if unknown:
        raise InputError(f"rope_scaling: {', '.join(unknown)} of type {kind!r} cannot be taken over")
    scaling: dict[str, Any] = {"type": kind}
    for name in _ROPE_FIELDS:
        # Files carry numbers of other types along, which transformers does not read either.
        value = parameters.get(name) if name == "factor" or name in SCALING_FIELDS[kind] else None
        scaling[name] = value if value is None or name in _ROPE_INTEGERS else float(value)
    if kind in ("dynamic", "yarn") and scaling["original_max_position_embeddings"] is None:
        scaling["original_max_position_embeddings"] = config["max_position_embeddings"]
    return {**found, "rope_scaling": scaling}


def encode_rope(model: Mapping[str, Any], percent: tuple[str, float] | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which every version of transformers reads."""
    scaling = model["rope_scaling"]
    config: dict[str, Any] = {"rope_theta": model["rotary_base"], "rope_scaling": None}
    if percent is not None:
        config[percent[0]] = model["rotary_percent"]
    if scaling is not None:
        given = {name: scaling[name] for name in _ROPE_FIELDS if scaling[name] is not None}
        config["rope_scaling"] = {"rope_type": scaling["type"], **given}
    return config
