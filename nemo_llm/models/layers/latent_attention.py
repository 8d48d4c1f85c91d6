"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) under tensor parallelism, without Transformer Engine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from nemo_llm.megatron.models import become


class _SummedGradient(torch.autograd.Function):
    """The input itself; its gradient is summed over the group.

    Megatron's ``copy_to_tensor_model_parallel_region`` sums a copy where the gradient is a slice, as it is here, and
    hands on what it had (megatron/patches.toml, `latent_projection`).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """``x``, unchanged."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The sum over the group."""
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _LatentProjection(ColumnParallelLinear):
    """The projection to the latent and to the rotated part of the keys, whole on every tensor-parallel rank.

    Every rank's heads use the same rotated part: its gradient is their sum.
    """

    latent: int

    def forward(self, hidden: torch.Tensor, *inputs: Any, **settings: Any) -> tuple[torch.Tensor, Any]:
        """[s(/tp), b, h] -> [s(/tp), b, latent + rotated], split along the sequence as the input is."""
        part, bias = super().forward(hidden, *inputs, **settings)
        if self.tp_group.size() == 1:
            return part, bias
        whole = gather_from_tensor_model_parallel_region(part, group=self.tp_group)
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(whole, group=self.tp_group), bias
        latent, rotated = whole.split([self.latent, whole.shape[-1] - self.latent], -1)
        return torch.cat((latent, _SummedGradient.apply(rotated, self.tp_group)), -1), bias


class LatentAttention(MLASelfAttention):
    """Megatron's, whose local linear layers forget other ranks' heads in the gradient of the keys' rotated part.

    Megatron knows the class of that layer and takes no other (megatron/patches.toml, `latent_projection`).
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        become(self.linear_kv_down_proj, _LatentProjection)
        self.linear_kv_down_proj.latent = self.config.kv_lora_rank
        self.rotary_pos_emb.forward = partial(self._angles, self.rotary_pos_emb.forward)

    def _angles(self, forward: Callable[..., Any], length: int, **settings: Any) -> Any:
        """As Megatron's, ``[length, 1, 1, r]``; while tokens are decoded, those of their places, ``[1, b, 1, r]``."""
        cache = self.core_attention.cache
        if cache is None or cache.positions is None:
            return forward(length, **settings)
        found = forward(cache.num_slots, **settings)
        if isinstance(found, tuple):  # YaRN's factor comes along
            return found[0][cache.positions].transpose(0, 1), *found[1:]
        return found[cache.positions].transpose(0, 1)
