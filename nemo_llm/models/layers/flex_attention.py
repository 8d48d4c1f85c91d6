"""Attention under windows, document masks and soft caps without the matrix of scores: PyTorch's FlexAttention.

FlexAttention (arXiv:2412.05496) compiles a FlashAttention kernel around two small functions, which say what a query may
see and how a score is changed, and skips the blocks of scores in which nothing is seen.

Shapes: ``b`` micro-batch, ``n`` query heads, ``g`` key-value heads, ``sq`` queries, the last of ``sk`` positions, ``d``
head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_KEPT_MASKS = 8


def attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    documents: Tensor | None,
    window: int | None,
    rule: tuple[float, float | None],
) -> Tensor:
    """Causal attention of ``tensors`` = q [b, n, sq, d], k and v [b, g, sk, d] -> [b, n, sq, d].

    Args:
        documents: numbers ``[b, s]``, s at least sk; a token sees its own document alone. None: everything before it.
        window: how many positions a token sees, itself included; None: all.
        rule: factor on the scores, and the cap of ``cap * tanh(score / cap)`` (Gemma 2, arXiv:2408.00118) or None.

    Raises:
        RuntimeError: PyTorch could not compile a kernel for this GPU or these sizes.
    """
    q, k, v = tensors
    scale, cap = rule
    attention = _compiled()[0] if q.is_cuda else flex_attention
    seen_documents = None if documents is None else _Documents(documents, documents._version)
    try:
        return attention(
            q,
            k,
            v,
            score_mod=None if cap is None else _capped(cap),
            block_mask=_block_mask(seen_documents, window, (q.shape[2], k.shape[2]), q.device),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    except RuntimeError as error:
        error.add_note(f"FlexAttention failed for {tuple(q.shape)}: performance.flex_attention=false does without it")
        raise


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The kernel, and the search for blocks, which as written would make a matrix of all scores."""
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    def change(score: Tensor, _b: Tensor, _h: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return change


@dataclass(frozen=True, eq=False)
class _Documents:
    """Document numbers ``[b, s]`` that are equal to themselves alone, as long as nobody writes to them."""

    numbers: Tensor
    version: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Documents) and (self.numbers is other.numbers and self.version == other.version)

    def __hash__(self) -> int:
        return hash((id(self.numbers), self.version))


@lru_cache(_KEPT_MASKS)
def _block_mask(
    documents: _Documents | None, window: int | None, lengths: tuple[int, int], device: torch.device
) -> BlockMask:
    """Which blocks are seen: made once, since all layers of a forward pass ask for the same."""
    make = _compiled()[1] if device.type == "cuda" else create_block_mask
    numbers = None if documents is None else documents.numbers
    rows = None if numbers is None else numbers.shape[0]
    return make(_seen(numbers, window, lengths[1] - lengths[0]), rows, None, *lengths, device=device)


def _seen(documents: Tensor | None, window: int | None, offset: int) -> Callable[..., Tensor]:
    """Whether a query, counted from ``offset``, may look at a key."""

    def seen(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + offset
        allowed = key <= position
        if window is not None:
            allowed = allowed & (key > position - window)
        if documents is not None:
            allowed = allowed & (documents[b, position] == documents[b, key])
        return allowed

    return seen
