"""Where and over what some families normalise: behind a sublayer, or queries and keys over all heads at once."""

from functools import cache
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.distributed.nn.functional import all_reduce

from nemo_llm.models.layers.norm import Norm


class _PostNorm:
    """What `with_post_norm` adds to a linear layer."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **settings: Any) -> None:
        super().__init__(input_size, output_size, config=config, **settings)  # type: ignore[call-arg]
        self.post_layernorm = Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, in/tp] -> [s(/tp), b, out], normalised; the bias is inside already."""
        output, bias = super().forward(x)  # type: ignore[misc]
        return self.post_layernorm(output if bias is None else output + bias), None


@cache
def with_post_norm(linear: type) -> type:
    """The projection that ends a sublayer, and the norm that OLMo 2 and Gemma put behind it, before the residual."""
    return type(f"PostNorm{linear.__name__}", (_PostNorm, linear), {})


class WholeWidthNorm(nn.Module):
    """RMSNorm over all heads of queries or keys together (OLMo 2, arXiv:2501.00656), which tensor parallelism splits.

    Args:
        config: Megatron's configuration.
        hidden_size: channels of a head, as Megatron hands them to a norm of queries or keys.
        eps: added to the mean square.
        heads: heads in the whole model.
        tp_group: ranks that share them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int, tp_group: Any) -> None:
        super().__init__()
        self.eps, self.width, self.group = eps, heads * hidden_size, tp_group
        device = torch.cuda.current_device()
        own = self.width // tp_group.size()
        self.weight = nn.Parameter(torch.ones(own, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, heads/tp, d] -> the same shape and dtype; statistics in float32."""
        flat = x.flatten(2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            squares = all_reduce(squares, group=self.group)  # sums gradients over the ranks as well
        normed = flat * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(x.dtype)).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The weight is split like the heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class ParallelResidualLayer(TransformerLayer):
    """Attention and MLP both read the layer's input, and both are added to it (GPT-J, GPT-NeoX).

    Of Megatron's forward the half before the MLP is kept (megatron/patches.toml, `parallel_residual`).
    """

    def forward(self, hidden_states: torch.Tensor, *inputs: Any, **settings: Any) -> Any:
        """As Megatron's layer."""
        settings.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, *inputs, **settings)
        mlp = self.mlp(self.pre_mlp_layernorm(hidden_states), padding_mask=settings.get("padding_mask"))
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(mlp, attended, self.hidden_dropout), context


class FusedLayer(TransformerLayer):
    """Megatron's pre-norm layer with `Norm`s that take the residual along: one gradient kernel for norm and addition.

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
