"""Attention under windows, document masks and soft caps without the matrix of scores: PyTorch's FlexAttention.

FlexAttention (arXiv:2412.05496) compiles a FlashAttention kernel around two small functions, which say what a query may
see and how a score is changed, and skips the blocks of scores in which nothing is seen.

Shapes: ``b`` micro-batch, ``n`` query heads, ``g`` key-value heads, ``sq`` queries, the last of ``sk`` positions, ``d``
head size.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_KEPT_MASKS = 8
# Which blocks are seen: all layers of a forward pass ask for the same. A mask holds its documents, so that no other
# tensor gets their id.
_masks: OrderedDict[tuple, BlockMask] = OrderedDict()


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
    try:
        return attention(
            q,
            k,
            v,
            score_mod=None if cap is None else _capped(cap),
            block_mask=_block_mask(documents, window, (q.shape[2], k.shape[2]), q.device),
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


def _block_mask(
    documents: Tensor | None, window: int | None, lengths: tuple[int, int], device: torch.device
) -> BlockMask:
    """Made once for the same documents, as long as they are not written to."""
    version = None if documents is None else (id(documents), documents._version)
    key = (version, window, lengths, device)
    if key in _masks:
        _masks.move_to_end(key)
        return _masks[key]
    make = _compiled()[1] if device.type == "cuda" else create_block_mask
    rows = None if documents is None else documents.shape[0]
    mask = make(_seen(documents, window, lengths[1] - lengths[0]), rows, None, *lengths, device=device)
    _masks[key] = mask
    if len(_masks) > _KEPT_MASKS:
        _masks.popitem(last=False)
    return mask


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
