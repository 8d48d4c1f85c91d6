"""How single values of ``config.json`` become values of the model section, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_llm.config.sections.model import SCALING_FIELDS
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

_ROPE_FIELDS = {kind: ("factor", *names) for kind, names in SCALING_FIELDS.items()}
_ROPE_SECTION = (
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
# Keys without an effect: ``finetuned`` is read by no version, ``truncate`` only where it is false.
_ROPE_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "finetuned": (True, False),
    "truncate": (True,),
    "partial_rotary_factor": (1.0,),
}


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
        far, near = dict(nested["full_attention"]), dict(nested.get("sliding_attention") or {})
        if (near.get("rope_type") or near.get("type") or "default") != "default":
            raise InputError(f"rope_parameters: {near} in layers with a window is not built")
        flat |= {"rope_parameters": far, "rope_theta": far.get("rope_theta", flat.get("rope_theta"))}
        if "rope_theta" in near:
            flat["rope_local_base_freq"] = near["rope_theta"]
    return flat


def decode_rope(
    config: Mapping[str, Any], base_key: tuple[str, float], share_key: tuple[str, float] | None
) -> dict[str, Any]:
    """``rotary_base``, ``rotary_percent`` and ``rope_scaling`` of the model section.

    transformers 5 writes ``rope_parameters``; earlier versions ``rope_scaling`` and keys beside it, which transformers
    prefers where both are there. From 4.43 on the type stands under ``rope_type``, and under ``type`` as well.

    Args:
        base_key: key of ``config.json`` for the base, and its default.
        share_key: key for the rotated share of a head, and its default; None: all of it.

    Raises:
        InputError: a way of scaling that is not known, or a part of one that is not built.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"rope_scaling: {given!r} is no mapping of a way of scaling")
    parameters = dict(given)
    base = parameters.pop("rope_theta", None) or config.get(base_key[0]) or base_key[1]
    old_kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or old_kind or "default"
    share = 1.0
    if share_key is not None:
        share = parameters.pop("partial_rotary_factor", None) or config.get(share_key[0]) or share_key[1]
    if kind != "default" and kind not in _ROPE_FIELDS:
        raise InputError(
            f"rope_scaling: type {kind!r} is not known; known are {', '.join(_ROPE_FIELDS)}. A model converted without "
            "its scaling would be another model"
        )
    for name, value in parameters.items():
        if name not in _ROPE_SECTION and value is not None and value not in _ROPE_WITHOUT_EFFECT.get(name, ()):
            raise InputError(f"rope_scaling: {name}={value!r} of type {kind!r} cannot be taken over")
    scaling = None if kind == "default" else _decode_scaling(kind, parameters, config)
    return {"rotary_base": float(base), "rotary_percent": float(share), "rope_scaling": scaling}


def _decode_scaling(kind: str, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: parameters.get(name) for name in _ROPE_FIELDS[kind]}
    length = config["max_position_embeddings"]
    # transformers takes the key beside the scaling first, where there is one (Phi 3), and for ``dynamic`` no other
    # length than that of the model.
    trained = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    trained = length if kind == "dynamic" else trained or length
    if kind == "yarn" and given["factor"] is None:
        given["factor"] = length / trained
    if given["factor"] is None:
        raise InputError(f"rope_scaling: type {kind!r} without a factor")
    floats = {name: _as_float(given.get(name)) for name in _ROPE_SECTION}
    return {"type": kind, **floats, "original_max_position_embeddings": None if kind == "linear" else trained}


def encode_rope(model: Mapping[str, Any], base_key: str, share_key: str | None) -> dict[str, Any]:
    """The base, the rotated share and ``rope_scaling``, under keys that every version of transformers reads."""
    scaling = model["rope_scaling"]
    config: dict[str, Any] = {base_key: model["rotary_base"], "rope_scaling": None}
    if share_key is not None:
        config[share_key] = model["rotary_percent"]
    if scaling is not None:
        given = {name: scaling[name] for name in _ROPE_FIELDS[scaling["type"]] if scaling[name] is not None}
        config["rope_scaling"] = {"rope_type": scaling["type"], **given}
    return config
