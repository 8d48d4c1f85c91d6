"""What every adapter is: a module without children whose parameters know their names and splits in the whole model.

A layer gets its adapter by a change of class in place, so that names of weights, checkpoints of the frozen model and
Megatron's own code see what they saw before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.utils import unwrap_model
from torch import nn

from nemo_llm.errors import InputError
from nemo_llm.megatron.models import mix_in
from nemo_llm.models.layers.classification_head import HEAD_PREFIX, ScoreHead

KEY_PREFIX = "adapter."


@dataclass(frozen=True)
class Placement:
    """Where a trained parameter belongs: its name in the whole model, and how ranks share it."""

    name: str
    split_dim: int | None
    """Dimension that tensor parallelism splits; None where every rank has the whole."""
    split: tuple[int, int]
    """(rank, size) in the group that splits it."""
    replica: int
    """Rank among those that hold the same: 0 saves."""


class Adapter(nn.Module):
    """The trained part of one module. Parameters live here directly; `place` says what each is."""

    def __init__(self) -> None:
        super().__init__()
        self.placements: dict[str, Placement] = {}

    def add(self, name: str, value: torch.Tensor, placement: Placement, **marks: bool) -> None:
        """Register a trained parameter; ``marks`` are the attributes that Megatron looks for on it."""
        parameter = nn.Parameter(value)
        for mark, state in marks.items():
            setattr(parameter, mark, state)
        self.register_parameter(name, parameter)
        self.placements[name] = placement

    def shards(self) -> Iterator[tuple[str, ShardedTensor]]:
        """(parameter's name here, its sharded tensor) of every parameter."""
        for name, placement in self.placements.items():
            offsets = []
            if placement.split_dim is not None and placement.split[1] > 1:
                offsets.append((placement.split_dim, *placement.split))
            replica = (0, 0 if offsets else placement.split[0], placement.replica)
            yield (
                name,
                ShardedTensor.from_rank_offsets(
                    KEY_PREFIX + placement.name, getattr(self, name), *offsets, replica_id=replica
                ),
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        """Weights of the frozen model alone are loaded through ``load_state_dict``; what is missing here is right.

        torch calls this for every module (2.10 to 2.13); tests/peft/test_layouts.py loads frozen weights through it.
        """
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *arguments)


class _WithAdapter:
    """Mixed into a module's class: the frozen module's checkpoint holds nothing of the adapter."""

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **settings: Any) -> dict:
        state = super().sharded_state_dict(prefix, *arguments, **settings)  # type: ignore[misc]
        return {key: value for key, value in state.items() if not key.startswith(f"{prefix}adapter.")}


class _AdaptedLinear(_WithAdapter):
    """A column- or row-parallel linear layer with a `LinearAdapter`."""

    adapter: Any
    adapter_active = True

    def forward(self, input_: torch.Tensor, *arguments: Any, **settings: Any) -> tuple[torch.Tensor, Any]:
        forward = super().forward  # type: ignore[misc]
        if not self.adapter_active:
            return forward(input_, *arguments, **settings)
        input_, kept = self.adapter.before(input_)
        out, bias = forward(input_, *arguments, **settings)
        return self.adapter.after(kept, out, bias)


class _AdaptedEmbedding(_WithAdapter):
    """A word embedding whose negative ids are virtual tokens."""

    adapter: Any
    adapter_active = True

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        embedded = super().forward(input_.clamp(min=0))  # type: ignore[misc]
        return self.adapter.replace(input_, embedded) if self.adapter_active else embedded


def put_on_linear(linear: Any, adapter: Adapter) -> None:
    """Let ``linear`` run with ``adapter`` from now on."""
    mix_in(linear, _AdaptedLinear, "Adapted")
    linear.adapter = adapter.to(linear.weight.device)


def put_on_embedding(embedding: Any, adapter: Adapter) -> None:
    """Let ``embedding`` take negative ids as virtual tokens from now on."""
    mix_in(embedding, _AdaptedEmbedding, "Adapted")
    embedding.adapter = adapter.to(embedding.weight.device)


def adapted_modules(chunks: list[torch.nn.Module]) -> Iterator[Any]:
    """Modules of these chunks, wrapped or not, that have an adapter (as ``.adapter``)."""
    for chunk in chunks:
        for module in unwrap_model(chunk).modules():
            if isinstance(module, _WithAdapter):
                yield module


def adapter_state(chunks: list[torch.nn.Module]) -> dict[str, ShardedTensor]:
    """All that is trained, as sharded tensors by their names: no layout, nothing frozen. A head is trained too."""
    state = {shard.key: shard for module in adapted_modules(chunks) for _, shard in module.adapter.shards()}
    for head in heads(chunks):
        state |= head.sharded_state_dict(KEY_PREFIX + HEAD_PREFIX)
    return state


def heads(chunks: list[torch.nn.Module]) -> list[ScoreHead]:
    """The head in place of the output layer, where these chunks have one."""
    return [whole.score for whole in map(unwrap_model, chunks) if whole.score is not None]


@torch.no_grad()
def merge_adapters(chunks: list[torch.nn.Module]) -> Callable[[], None]:
    """Write into each adapted layer the weight that does the same alone; returns what undoes it, bit by bit.

    Raises:
        InputError: adapters that are no change of weights (bottlenecks, virtual tokens).
    """
    before = []
    for module in adapted_modules(chunks):
        merged = module.adapter.merge() if hasattr(module.adapter, "merge") else None
        if merged is None:
            kind = type(module.adapter).__name__
            raise InputError(f"a {kind} cannot be merged: it is no change of weights; keep it beside the model")
        weight, bias = merged
        before.append((module, module.weight.clone(), None if module.bias is None else module.bias.clone()))
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
        module.adapter_active = False

    @torch.no_grad()
    def unmerge() -> None:
        for module, weight, bias in before:
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
            module.adapter_active = True

    return unmerge
