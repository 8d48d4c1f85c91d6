"""The few ways in which tensors of one format become tensors of another. Each has its exact inverse.

They work on tensors of the ``meta`` device as well, which is how shapes are known before anything is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_llm.config.sections.arithmetic import padded_vocab_size

Tensors = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes that transforms need."""

    heads: int
    groups: int
    channels: int
    vocabulary: int
    padded_vocabulary: int

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "AttentionShape":
        """Of a model section whose vocabulary is known."""
        return cls(
            heads=model["num_attention_heads"],
            groups=model["num_query_groups"],
            channels=model["kv_channels"] or model["hidden_size"] // model["num_attention_heads"],
            vocabulary=model["vocab_size"],
            padded_vocabulary=padded_vocab_size(model["vocab_size"], model["make_vocab_size_divisible_by"]),
        )


@dataclass(frozen=True, slots=True)
class Transform:
    """``to_ours`` makes one tensor of theirs; ``to_theirs`` is its inverse."""

    to_ours: Callable[[Tensors, AttentionShape], torch.Tensor]
    to_theirs: Callable[[torch.Tensor, AttentionShape], Tensors]


def _pad(tensors: Tensors, shape: AttentionShape) -> torch.Tensor:
    """[v, ...] -> [padded v, ...]; the rows in addition are zero."""
    (weight,) = tensors
    missing = shape.padded_vocabulary - weight.shape[0]
    return weight if missing <= 0 else torch.cat((weight, weight.new_zeros(missing, *weight.shape[1:])))


def _join_qkv(tensors: Tensors, shape: AttentionShape) -> torch.Tensor:
    """Rows [n*d], [g*d], [g*d] -> [(n + 2g)*d]: Megatron keeps each group's queries before its key and value."""
    rest = tensors[0].shape[1:]
    parts = [part.reshape(shape.groups, -1, *rest) for part in tensors]
    return torch.cat(parts, 1).reshape(-1, *rest)


def _split_qkv(weight: torch.Tensor, shape: AttentionShape) -> Tensors:
    rest = weight.shape[1:]
    queries = shape.heads // shape.groups * shape.channels
    parts = weight.reshape(shape.groups, -1, *rest).split([queries, shape.channels, shape.channels], 1)
    return [part.reshape(-1, *rest) for part in parts]


def _stack_qkv(tensors: Tensors, shape: AttentionShape) -> torch.Tensor:
    """As `_join_qkv`, of one tensor whose rows are all queries, then all keys, then all values."""
    sizes = [shape.heads * shape.channels, shape.groups * shape.channels, shape.groups * shape.channels]
    return _join_qkv(list(tensors[0].split(sizes)), shape)


def _transposed(transform: Transform) -> Transform:
    """The same for matrices that are stored [in, out] (GPT-2's Conv1D)."""
    return Transform(
        lambda tensors, shape: transform.to_ours([tensor.t() for tensor in tensors], shape),
        lambda weight, shape: [part.t() for part in transform.to_theirs(weight, shape)],
    )


_COPY = Transform(lambda tensors, _: tensors[0], lambda weight, _: [weight])
_STACKED_QKV = Transform(_stack_qkv, lambda weight, shape: [torch.cat(_split_qkv(weight, shape))])

TRANSFORMS: Mapping[str, Transform] = {
    "copy": _COPY,
    "vocabulary": Transform(_pad, lambda weight, shape: [weight[: shape.vocabulary]]),
    "qkv": Transform(_join_qkv, _split_qkv),
    "stacked_qkv": _STACKED_QKV,
    "transposed_stacked_qkv": _transposed(_STACKED_QKV),
    "transpose": _transposed(_COPY),
    "concatenate": Transform(lambda tensors, _: torch.cat(tensors), lambda weight, _: list(weight.chunk(2))),
}
