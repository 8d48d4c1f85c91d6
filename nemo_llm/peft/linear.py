"""Megatron's linear layers as PEFT sees them: their parts, how tensor parallelism splits them, what sums what.

A part is what other libraries have as a layer of its own: ``linear_q``, ``linear_k`` and ``linear_v`` of
``linear_qkv``, ``linear_gate`` and ``linear_up`` of a gated ``linear_fc1``. Rows of a local weight are output features.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class LinearPart:
    """One part: its leaf name and its rows on this rank."""

    leaf: str
    rows: int


@dataclass(frozen=True)
class LinearPlace:
    """One linear layer of this rank and its place in the whole model."""

    linear: Any
    name: str
    """Dotted name with the number of the layer (and expert) in the whole model."""
    parts: tuple[LinearPart, ...]
    groups: int
    """Blocks in which the parts' rows alternate: key-value groups of ``linear_qkv``, otherwise 1."""
    pg_collection: Any

    @property
    def column(self) -> bool:
        """Whether tensor parallelism splits outputs; otherwise it splits inputs."""
        return isinstance(self.linear, ColumnParallelLinear)

    @property
    def expert(self) -> bool:
        return bool(self.linear.is_expert)

    @property
    def in_features(self) -> int:
        """On this rank."""
        return self.linear.weight.shape[1]

    @property
    def group(self) -> dist.ProcessGroup:
        return self.linear.tp_group

    @property
    def tokens_exchanged(self) -> bool:
        """Whether Megatron gathers tokens before, and sums outputs behind, the whole MLP (experts) and not here."""
        return bool(self.linear.explicit_expert_comm)

    @property
    def sequence_parallel(self) -> bool:
        return bool(self.linear.sequence_parallel) and not self.tokens_exchanged and self.group.size() > 1

    def part_name(self, part: LinearPart) -> str:
        """Full name of a part."""
        return f"{self.name.rpartition('.')[0]}.{part.leaf}"

    def assemble(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of all parts, ``[rows of the part, ...]`` each, in the order of this rank's weight."""
        if len(tensors) == 1:
            return tensors[0]
        blocks = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(blocks, 1).flatten(0, 1)

    def take_apart(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Inverse of `assemble`."""
        if len(self.parts) == 1:
            return [whole]
        sizes = [part.rows // self.groups for part in self.parts]
        return [piece.flatten(0, 1) for piece in whole.unflatten(0, (self.groups, -1)).split(sizes, 1)]

    def narrow_in(self, low: torch.Tensor) -> torch.Tensor:
        """Between a product with this rank's inputs and one with this rank's outputs: make a narrow tensor whole.

        Column-parallel: inputs are whole already, under sequence parallelism of some tokens; the gradient is a sum over
        ranks. Row-parallel: the product is a part of a sum.
        """
        if self.group.size() == 1:
            return low
        if self.column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, group=self.group)
            return copy_to_tensor_model_parallel_region(low, group=self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        return reduce_from_tensor_model_parallel_region(low, group=self.group)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of a side path. Where Megatron sums input gradients of experts over ranks, a whole one counts once."""
        if self.tokens_exchanged and self.column and self.group.size() > 1:
            return _Scale.apply(x, 1.0, 1.0 / self.group.size())
        return x

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        """Outputs of a side path. Where Megatron sums outputs of experts over ranks, a whole one counts once."""
        if self.tokens_exchanged and not self.column and self.group.size() > 1:
            return _Scale.apply(out, 1.0 / self.group.size(), 1.0)
        return out


class _Scale(torch.autograd.Function):
    """One factor forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_factor = backward
        return x * forward if forward != 1.0 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grads[0]
        return (grad * ctx.backward_factor if ctx.backward_factor != 1.0 else grad), None, None


def find_linears(chunk: torch.nn.Module, config: TransformerConfig, pg_collection: Any) -> list[LinearPlace]:
    """Every linear layer inside the transformer layers of this (unwrapped) chunk."""
    found = []
    for layer in chunk.decoder.layers:
        prefix = f"decoder.layers.{layer.layer_number - 1}"
        for local, module in layer.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                name = f"{prefix}.{_global_expert(local, layer, pg_collection)}"
                parts, groups = _parts(name.rpartition(".")[2], module, config)
                found.append(LinearPlace(module, name, parts, groups, pg_collection))
    return found


def _global_expert(local: str, layer: Any, pg_collection: Any) -> str:
    """``mlp.experts.local_experts.1.linear_fc1`` -> ``mlp.experts.<number in the whole layer>.linear_fc1``."""
    head, found, tail = local.partition("local_experts.")
    if not found:
        return local
    number, _, rest = tail.partition(".")
    first = pg_collection.ep.rank() * layer.mlp.num_local_experts
    return f"{head}{first + int(number)}.{rest}"


def _parts(leaf: str, module: Any, config: TransformerConfig) -> tuple[tuple[LinearPart, ...], int]:
    rows = module.weight.shape[0]
    if leaf == "linear_qkv":
        head = config.kv_channels
        per_group = config.num_attention_heads // config.num_query_groups
        groups = rows // ((per_group + 2) * head)
        q, kv = groups * per_group * head, groups * head
        return (LinearPart("linear_q", q), LinearPart("linear_k", kv), LinearPart("linear_v", kv)), groups
    if leaf == "linear_fc1" and config.gated_linear_unit:
        return (LinearPart("linear_gate", rows // 2), LinearPart("linear_up", rows // 2)), 1
    return (LinearPart(leaf, rows),), 1
