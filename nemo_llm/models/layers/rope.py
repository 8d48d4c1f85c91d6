"""Rotary embedding (RoFormer, arXiv:2104.09864) as one kernel, alone or with the split of the joint projection."""

from functools import cache
from typing import Any

import torch


def rotate(t: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotate ``t`` [s, b, n, d] by the angles ``freqs`` [s, 1, 1, r]; channels beyond r pass unchanged.

    Halves are rotated against each other, as Megatron and Hugging Face's Llama do it.
    """
    channels = freqs.shape[-1]
    rotated, rest = t[..., :channels], t[..., channels:]
    first, second = rotated.chunk(2, -1)
    cos, sin = freqs.cos().to(t.dtype), freqs.sin().to(t.dtype)
    turned = torch.cat((-second, first), -1)
    result = rotated * cos + turned * sin
    return torch.cat((result, rest), -1) if rest.shape[-1] else result


@cache
def _compiled_rotate() -> Any:
    return torch.compile(rotate, dynamic=False)


def rotate_fused(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """`rotate` in one kernel."""
    if interleaved:
        raise ValueError("performance.fused_rope: interleaved rotary embeddings are not among the fused ones")
    return _compiled_rotate()(t, freqs)


def split_and_rotate(
    mixed: torch.Tensor, query_freqs: torch.Tensor, _key_freqs: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mixed`` [s, b, G, (R + 2) D], ``query_freqs`` [s, 1, 1, r], ``sizes`` [R D, D, D]; keys turn as queries do.

    While tokens are decoded s is 1 and ``query_freqs`` [1, b, 1, r]: each row stands at a position of its own.
    """
    from nemo_llm.kernels.qkv_split_rotary import FusedQKV

    angles = query_freqs.flatten(0, 1).flatten(1).float()
    by_row = query_freqs.shape[1] > 1
    if by_row:
        mixed = mixed.transpose(0, 1)
    q, k, v = FusedQKV.apply(mixed, angles.cos(), angles.sin(), (sizes[0] // sizes[1], sizes[1]))
    return (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)) if by_row else (q, k, v)
