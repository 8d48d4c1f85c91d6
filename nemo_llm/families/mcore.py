"""Megatron-Core's own models: names of their tensors, and their configuration in its three spellings.

`fields` below are names of Megatron-Core's ``TransformerConfig`` and ``GPTModel``. Megatron-Bridge and NeMo 2 save them
as they are; Megatron-LM saves its command line (`fields_of_arguments`, `arguments_of_fields`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_llm.errors import InputError
from nemo_llm.families.spec import Family, Rule

_LAYER = "decoder.layers."
_NUMBERED = "decoder.layers.{layer}."
_BIASED_NORM = ("normalization=LayerNorm",)
_DENSE, _MOE = ("not moe",), ("moe",)


def _same(name: str, *when: str) -> Rule:
    return Rule(_LAYER + name, (_NUMBERED + name,), when=when)


def _expert(name: str, *when: str) -> Rule:
    theirs = f"{_NUMBERED}mlp.experts.local_experts.{{expert}}.{name}"
    return Rule(f"{_LAYER}mlp.experts.experts.{name}", (theirs,), when=(*_MOE, *when))


def _outside(name: str, *when: str, transform: str = "copy") -> Rule:
    return Rule(name, (name,), transform, when)


MCORE = Family(
    name="Megatron-Core",
    model_type="megatron",
    architecture="GPTModel",
    constants={},
    fields=(),
    tensors=(
        _outside("embedding.word_embeddings.weight", transform="vocabulary"),
        _outside("embedding.position_embeddings.weight", "position_embedding_type=learned_absolute"),
        _outside("decoder.final_layernorm.weight"),
        _outside("decoder.final_layernorm.bias", *_BIASED_NORM),
        _outside("output_layer.weight", "not share_embeddings_and_output_weights", transform="vocabulary"),
        _same("self_attention.linear_qkv.layer_norm_weight"),
        _same("self_attention.linear_qkv.layer_norm_bias", *_BIASED_NORM),
        _same("self_attention.linear_qkv.weight"),
        _same("self_attention.linear_qkv.bias", "add_qkv_bias"),
        _same("self_attention.q_layernorm.weight", "qk_layernorm"),
        _same("self_attention.k_layernorm.weight", "qk_layernorm"),
        _same("self_attention.q_layernorm.bias", "qk_layernorm", *_BIASED_NORM),
        _same("self_attention.k_layernorm.bias", "qk_layernorm", *_BIASED_NORM),
        _same("self_attention.linear_proj.weight"),
        _same("self_attention.linear_proj.bias", "add_bias_linear"),
        _same("mlp.linear_fc1.layer_norm_weight", *_DENSE),
        _same("mlp.linear_fc1.layer_norm_bias", *_DENSE, *_BIASED_NORM),
        _same("mlp.linear_fc1.weight", *_DENSE),
        _same("mlp.linear_fc1.bias", *_DENSE, "add_bias_linear"),
        _same("mlp.linear_fc2.weight", *_DENSE),
        _same("mlp.linear_fc2.bias", *_DENSE, "add_bias_linear"),
        _same("pre_mlp_layernorm.weight", *_MOE),
        _same("pre_mlp_layernorm.bias", *_MOE, *_BIASED_NORM),
        _same("mlp.router.weight", *_MOE),
        _expert("linear_fc1.weight"),
        _expert("linear_fc1.bias", "add_bias_linear"),
        _expert("linear_fc2.weight"),
        _expert("linear_fc2.bias", "add_bias_linear"),
    ),
    ignored=("._extra_state", ".inv_freq"),
)

# Of a mixture, Megatron-Core's two implementations of a layer keep this norm under different names.
LOCAL_NAMES = {
    f"{_LAYER}pre_mlp_layernorm.{part}": f"{_LAYER}mlp.linear_fc1.layer_norm_{part}" for part in ("weight", "bias")
}

_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NEEDED: list[str] = _TABLES["needed"]
SAME, MOE_SAME, OURS_ALONE = (_TABLES[name] for name in ("same", "moe_same", "ours_alone"))
_PLAIN: Mapping[str, list[Any]] = _TABLES["plain"]
_FLOATS = {"layernorm_epsilon", "rotary_base", "rotary_percent", "hidden_dropout", "attention_dropout"}
# Llama 3.1's rotary scaling, whose other numbers are fixed in Megatron-Core.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def section_of_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys of our model section, without the vocabulary's size.

    Raises:
        InputError: a field that is missing, or a value that stands for what is not built.
    """
    missing = [name for name in NEEDED if fields.get(name) is None]
    if missing:
        raise InputError(f"{where}: says nothing of {', '.join(missing)}, without which there is no model")
    for name, values in _PLAIN.items():
        if fields.get(name) not in values:
            raise InputError(f"{where}: {name}={fields[name]!r} is not built here")
    section = {name: fields[name] for name in NEEDED} | {name: fields.get(name, usual) for name, usual in SAME.items()}
    section |= {name: float(section[name]) for name in _FLOATS}
    section["num_query_groups"] = section["num_query_groups"] or section["num_attention_heads"]
    section["add_qkv_bias"] = bool(section["add_qkv_bias"] or section["add_bias_linear"])
    section["max_position_embeddings"] = fields.get("max_sequence_length") or fields.get("seq_length") or 2048
    window = fields.get("window_size")
    # Megatron counts the tokens to the left of the present one; our window includes the token itself.
    section["window_size"] = None if window is None or window[0] < 0 else window[0] + 1
    section["rope_scaling"] = _rope_scaling(fields)
    section["moe"] = _moe_section(fields)
    return section


def _rope_scaling(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    if fields.get("rope_scaling"):
        return {"type": "llama3", "factor": float(fields.get("rope_scaling_factor") or 8.0), **_LLAMA3}
    if fields.get("old_context_len") and fields.get("scale_factor"):  # NeMo 2's Llama 3.1
        names = {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        given = {ours: float(fields[theirs]) for ours, theirs in names.items()}
        trained = {"original_max_position_embeddings": fields["old_context_len"]}
        return {"type": "llama3", "factor": float(fields["scale_factor"]), **given, **trained}
    if fields.get("seq_len_interpolation_factor"):
        return {"type": "linear", "factor": float(fields["seq_len_interpolation_factor"])}
    return None


def _moe_section(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    if not fields.get("num_moe_experts"):
        return None
    section = {name: fields.get(name, usual) for name, usual in MOE_SAME.items()}
    section["moe_ffn_hidden_size"] = section["moe_ffn_hidden_size"] or fields["ffn_hidden_size"]
    section["moe_aux_loss_coeff"] = float(section["moe_aux_loss_coeff"])
    return {
        **section,
        "num_moe_experts": fields["num_moe_experts"],
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": None,
        "moe_layer_freq": 1,
        "moe_grouped_gemm": True,
    }


def fields_of_section(model: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-Core's fields for our model section, its vocabulary known.

    Raises:
        InputError: it asks for what Megatron-Core alone cannot build.
    """
    alone = [f"{key}={model[key]!r}" for key, plain in OURS_ALONE.items() if model.get(key, plain) != plain]
    if model["qk_layernorm"] and model["qk_layernorm_scope"] != "head":
        alone.append(f"qk_layernorm_scope={model['qk_layernorm_scope']!r}")
    moe = model["moe"] or {}
    if moe and (moe["moe_layer_freq"] != 1 or moe["moe_shared_expert_intermediate_size"]):
        alone.append("model.moe with dense layers or shared experts")
    if alone:
        raise InputError(f"Megatron-Core has no fields for {', '.join(alone)}: this model stays in our format or hf")
    fields = {name: model[name] for name in (*NEEDED, *SAME)}
    if moe:
        fields |= {name: moe[name] for name in MOE_SAME} | {"num_moe_experts": moe["num_moe_experts"]}
    window = model["window_size"]
    fields |= {
        "kv_channels": model["kv_channels"] or model["hidden_size"] // model["num_attention_heads"],
        "max_sequence_length": model["max_position_embeddings"],
        "window_size": None if window is None else (window - 1, 0),
        "vocab_size": model["vocab_size"],
    }
    scaling = model["rope_scaling"]
    if scaling is None:
        return fields
    if scaling["type"] == "linear":
        return {**fields, "seq_len_interpolation_factor": scaling["factor"]}
    if scaling["type"] == "llama3" and all(scaling[key] == value for key, value in _LLAMA3.items()):
        return {**fields, "rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    raise InputError(f"rope_scaling={scaling!r}: Megatron-LM knows linear, and Llama 3.1's own alone")


def fields_of_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments, as its ``pretrain_gpt.py`` makes a model of them."""
    fields = dict(arguments)
    fields["layernorm_zero_centered_gamma"] = arguments.get("apply_layernorm_1p", False)
    fields["layernorm_epsilon"] = arguments.get("norm_epsilon", 1e-5)
    fields["num_moe_experts"] = arguments.get("num_experts")
    if not arguments.get("group_query_attention"):
        fields["num_query_groups"] = None
    gelu = "gelu_tanh" if arguments.get("bias_gelu_fusion") and arguments.get("add_bias_linear") else "gelu"
    gated = {"swiglu": "silu", "quick_geglu": "quick_gelu"}
    fields["gated_linear_unit"] = any(arguments.get(name) for name in gated)
    fields["activation_func"] = next((func for name, func in gated.items() if arguments.get(name)), gelu)
    if arguments.get("squared_relu"):
        fields["activation_func"] = "squared_relu"
    fields["share_embeddings_and_output_weights"] = not arguments.get("untie_embeddings_and_output_weights", False)
    fields["rope_scaling"] = arguments.get("use_rope_scaling", False)
    fields["seq_len_interpolation_factor"] = arguments.get("rotary_seq_len_interpolation_factor")
    fields["max_sequence_length"] = arguments.get("max_position_embeddings")
    return fields


def arguments_of_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Megatron-LM that describe a model, for ``--use-checkpoint-args``.

    Raises:
        InputError: an activation that its command line cannot say.
    """
    activation, gated = fields["activation_func"], fields["gated_linear_unit"]
    sayable = {("silu", True), ("gelu", False), ("squared_relu", False)}
    if fields["add_bias_linear"]:
        sayable.add(("gelu_tanh", False))
    if (activation, gated) not in sayable:
        kind = f"activation_func={activation}, gated_linear_unit={gated}, add_bias_linear={fields['add_bias_linear']}"
        raise InputError(f"{kind}: Megatron-LM's command line has no word for it")
    renamed = {"activation_func", "gated_linear_unit", "layernorm_zero_centered_gamma", "num_moe_experts"}
    arguments = {name: value for name, value in fields.items() if name not in renamed}
    tied = arguments.pop("share_embeddings_and_output_weights")
    length = arguments.pop("max_sequence_length")
    epsilon, llama3 = arguments.pop("layernorm_epsilon"), arguments.pop("rope_scaling", False)
    linear = arguments.pop("seq_len_interpolation_factor", None)
    return {
        **arguments,
        "norm_epsilon": epsilon,
        "apply_layernorm_1p": fields["layernorm_zero_centered_gamma"],
        "num_experts": fields.get("num_moe_experts"),
        "group_query_attention": fields["num_query_groups"] != fields["num_attention_heads"],
        "swiglu": activation == "silu",
        "squared_relu": activation == "squared_relu",
        "bias_gelu_fusion": activation == "gelu_tanh",
        "bias_swiglu_fusion": activation == "silu",
        "untie_embeddings_and_output_weights": not tied,
        "use_rope_scaling": llama3,
        "rotary_seq_len_interpolation_factor": linear,
        "max_position_embeddings": length,
        "seq_length": length,
        "rotary_interleaved": False,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": fields["position_embedding_type"] == "rope",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
