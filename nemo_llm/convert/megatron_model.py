"""The other side of the gate for Megatron's formats: Megatron-Core's own ``GPTModel`` with its own layers, on CPU."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_llm.config.shipped import one_cpu
from nemo_llm.convert.logit_check import Outputs, forward_megatron
from nemo_llm.convert.megatron_files import MegatronReader, canonical
from nemo_llm.parallel.runtime import own_runtime

_GPT_FIELDS = (
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rope_scaling",
    "rope_scaling_factor",
    "seq_len_interpolation_factor",
    "share_embeddings_and_output_weights",
)
_CONFIG_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "normalization", "layernorm_epsilon", "gated_linear_unit", "add_bias_linear"),
    *("add_qkv_bias", "qk_layernorm", "softmax_scale", "window_size", "window_attn_skip_freq"),
    *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
    *("moe_router_score_function", "moe_router_pre_softmax"),
)


def build_gpt_model(fields: Mapping[str, Any], vocab_size: int, groups: Any) -> Any:
    """Megatron-Core's model of these fields, in float32, built as Megatron-LM's ``--transformer-impl local`` does."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_llm.megatron.models import define_missing_names
    from nemo_llm.models.transformer_config import ACTIVATIONS

    define_missing_names()
    given = {name: fields[name] for name in _CONFIG_FIELDS if fields.get(name) is not None}
    if "window_size" in given:
        given["window_size"] = tuple(given["window_size"])
    config = TransformerConfig(
        **given,
        activation_func=ACTIVATIONS[fields["activation_func"]],
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        bias_activation_fusion=False,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    length = fields.get("max_sequence_length") or fields["seq_length"]
    settings = {name: fields[name] for name in _GPT_FIELDS if fields.get(name) is not None}
    return GPTModel(config, spec, vocab_size, length, pg_collection=groups, **settings).eval()


def load_tensors(model: Any, reader: MegatronReader, fields: Mapping[str, Any], layers: Sequence[int] | None) -> None:
    """Fill the model; with ``layers``, the layers of the checkpoint that its own are, in order."""
    with_experts = bool(fields.get("num_moe_experts"))
    for name, parameter in model.named_parameters():
        source = canonical(name, with_experts)
        if layers is not None:
            source = re.sub(r"layers\.(\d+)", lambda found: f"layers.{layers[int(found[1])]}", source)
        value = reader.read(source)
        with torch.no_grad():
            parameter.copy_(value)
            if fields.get("layernorm_zero_centered_gamma") and re.search(r"norm[._]weight$", source):
                parameter.add_(1.0)  # Megatron's own norm layers know no other form


def run_megatron(
    reader: MegatronReader,
    fields: Mapping[str, Any],
    layers: Sequence[int] | None,
    tokens: torch.Tensor,
    last: int | None = None,
) -> Outputs:
    """Logits, of the ``last`` tokens or of all, and the residual stream of Megatron-Core's model.

    Args:
        layers: those of the checkpoint that the model has; None: all of them.
    """
    fields = {**fields, "num_layers": len(layers)} if layers is not None else fields
    with own_runtime(one_cpu()) as runtime:
        vocabulary = reader.infos["embedding.word_embeddings.weight"].shape[0]
        model = build_gpt_model(fields, vocabulary, runtime.groups)
        load_tensors(model, reader, fields, layers)
        return forward_megatron(model, tokens, lambda logits: logits, last)
