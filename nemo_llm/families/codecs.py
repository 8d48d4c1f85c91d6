"""How single values of ``config.json`` become values of the model section, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    # Attention logits are multiplied by our number and divided by the root of theirs (Gemma).
    "inverse_root": Codec(lambda value: value**-0.5, lambda value: value**-2.0),
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


def decode_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rotary_base`` and ``rope_scaling`` of the model section.

    transformers 5 writes ``rope_parameters``; earlier versions ``rope_theta`` and ``rope_scaling``.

    Raises:
        InputError: a way of scaling that is not known.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    if kind == "default":
        return {"rotary_base": float(base), "rope_scaling": None}
    if kind not in _ROPE_TYPES:
        raise InputError(
            f"rope_scaling: type {kind!r} is not known; known are {', '.join(_ROPE_TYPES)}. A model converted without "
            "its scaling would be another model"
        )
    scaling: dict[str, Any] = {"type": kind}
    for name in _ROPE_FIELDS:
        value = parameters.get(name)
        scaling[name] = value if value is None or name in _ROPE_INTEGERS else float(value)
    if kind in ("dynamic", "yarn") and scaling["original_max_position_embeddings"] is None:
        scaling["original_max_position_embeddings"] = config["max_position_embeddings"]
    return {"rotary_base": float(base), "rope_scaling": scaling}


def encode_rope(model: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which every version of transformers reads."""
    scaling = model["rope_scaling"]
    if scaling is None:
        return {"rope_theta": model["rotary_base"], "rope_scaling": None}
    given = {name: scaling[name] for name in _ROPE_FIELDS if scaling[name] is not None}
    return {"rope_theta": model["rotary_base"], "rope_scaling": {"rope_type": scaling["type"], **given}}
