"""A transformer layer whose residual additions happen inside the norms, with one gradient kernel for both."""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer


class FusedLayer(TransformerLayer):
    """Megatron's pre-norm layer with `Norm`s that take the residual along.

    The parameters, their names and the arithmetic are Megatron's. Where a step between the norm and the sum would be
    something else (dropout, recomputed or offloaded norms, Megatron's own inference, an fp32 residual) Megatron's
    forward runs.
    """

    def forward(self, hidden_states: torch.Tensor, *inputs: Any, **settings: Any) -> tuple[torch.Tensor, Any]:
        """``[s/cp(/tp), b, h]`` -> the same shape, and the context, which is handed on."""
        if inputs or not self._plain(settings):
            return super().forward(hidden_states, *inputs, **settings)
        context = settings.get("context")
        padding_mask = settings.get("padding_mask")
        attention = {
            name: settings.get(name)
            for name in ("attention_mask", "rotary_pos_emb", "attention_bias", "packed_seq_params")
        }
        normed, residual = self.input_layernorm(hidden_states, return_sum=True)
        attended = _with_bias(*self.self_attention(normed, **attention))
        normed, residual = self.pre_mlp_layernorm(attended, residual=residual, return_sum=True)
        mlp_inputs = {} if padding_mask is None else {"padding_mask": padding_mask}
        return _with_bias(*self.mlp(normed, **mlp_inputs)) + residual, context

    def _plain(self, settings: dict[str, Any]) -> bool:
        recomputed = self.recompute_input_layernorm or self.recompute_pre_mlp_layernorm or self.recompute_mlp
        offloaded = self.offload_attn_norm or self.offload_mlp_norm
        dropped = self.training and self.hidden_dropout > 0.0
        inference = settings.get("inference_context") is not None or settings.get("inference_params") is not None
        return not (recomputed or offloaded or dropped or inference or self.config.fp32_residual_connection)


def _with_bias(output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return output if bias is None else output + bias
