"""Split of the joint projection into queries, keys and values, and their rotation, as one Triton kernel each way.

A program moves all heads of one token. The two halves of a head that turn against each other are tiles of their own, so
that every value is read once and neighbours in memory together.

Shapes: ``T`` tokens, ``G`` key-value groups of ``R`` query heads, ``D`` head size, ``r`` rotated channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 1024
"""Values of a tile, of which a program keeps two."""


@triton.jit
def _move_heads(
    mixed,
    part,
    cos,
    sin,
    heads,
    HEADS_A_GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """The ``heads`` of one kind and one token, ``COUNT`` of each group from the group's ``FIRST`` on."""
    half: tl.constexpr = TURNED // 2
    for begin in range(0, heads, BLOCK_HEADS):
        head = begin + tl.arange(0, BLOCK_HEADS)[:, None]
        in_mixed = ((head // COUNT) * HEADS_A_GROUP + FIRST + head % COUNT) * D
        in_part = head * D
        if TURNED > 0:
            channel = tl.arange(0, BLOCK_HALF)[None, :]
            known = channel < half
            there = (head < heads) & known
            c1, s1 = tl.load(cos + channel, known, 0.0), tl.load(sin + channel, known, 0.0)
            c2, s2 = tl.load(cos + half + channel, known, 0.0), tl.load(sin + half + channel, known, 0.0)
            if BACKWARD:
                first = tl.load(part + in_part + channel, there, 0.0).to(tl.float32)
                second = tl.load(part + in_part + half + channel, there, 0.0).to(tl.float32)
                into = mixed + in_mixed + channel
                tl.store(into, (first * c1 + second * s2).to(mixed.dtype.element_ty), there)
                tl.store(into + half, (second * c2 - first * s1).to(mixed.dtype.element_ty), there)
            else:
                first = tl.load(mixed + in_mixed + channel, there, 0.0).to(tl.float32)
                second = tl.load(mixed + in_mixed + half + channel, there, 0.0).to(tl.float32)
                into = part + in_part + channel
                tl.store(into, (first * c1 - second * s1).to(part.dtype.element_ty), there)
                tl.store(into + half, (second * c2 + first * s2).to(part.dtype.element_ty), there)
        if TURNED < D:
            channel = TURNED + tl.arange(0, BLOCK_REST)[None, :]
            there = (head < heads) & (channel < D)
            if BACKWARD:
                tl.store(mixed + in_mixed + channel, tl.load(part + in_part + channel, there), there)
            else:
                tl.store(part + in_part + channel, tl.load(mixed + in_mixed + channel, there), there)


@triton.jit
def _qkv(
    mixed,
    q,
    k,
    v,
    cos,
    sin,
    batch,
    groups,
    R: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All heads of one token: mixed [T, G, R + 2, D] <-> q [T, G * R, D], k and v [T, G, D], the first TURNED channels
    of q and k rotated, channel c against c + TURNED / 2."""
    token = tl.program_id(0).to(tl.int64)
    position = token // batch
    mixed += token * groups * ((R + 2) * D)
    q += token * groups * (R * D)
    k += token * groups * D
    v += token * groups * D
    cos += position * TURNED
    sin += position * TURNED
    _move_heads(mixed, q, cos, sin, groups * R, R + 2, 0, R, D, TURNED, BACKWARD, BLOCK_Q, BLOCK_HALF, BLOCK_REST)
    _move_heads(mixed, k, cos, sin, groups, R + 2, R, 1, D, TURNED, BACKWARD, BLOCK_K, BLOCK_HALF, BLOCK_REST)
    _move_heads(mixed, v, cos, sin, groups, R + 2, R + 1, 1, D, 0, BACKWARD, BLOCK_V, 1, BLOCK_D)


class FusedQKV(torch.autograd.Function):
    """Split the joint projection into queries, keys and values; rotate the first two (RoFormer, arXiv:2104.09864)."""

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sizes: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mixed`` [s, b, G, (R + 2) D], ``cos`` and ``sin`` [s, r] float32, ``sizes`` = (R, D).

        Returns:
            q ``[s, b, G R, D]``, k and v ``[s, b, G, D]``.
        """
        queries, width = sizes
        s, b, groups, _ = mixed.shape
        mixed = mixed.contiguous()
        q = torch.empty(s, b, groups * queries, width, dtype=mixed.dtype, device=mixed.device)
        k = torch.empty(s, b, groups, width, dtype=mixed.dtype, device=mixed.device)
        v = torch.empty_like(k)
        _launch_qkv(mixed, (q, k, v), (cos, sin), backward=False)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of ``mixed``."""
        s, b, groups, width = dk.shape
        queries = dq.shape[2] // groups
        mixed = torch.empty(s, b, groups, (queries + 2) * width, dtype=dq.dtype, device=dq.device)
        _launch_qkv(mixed, (dq.contiguous(), dk.contiguous(), dv.contiguous()), ctx.saved_tensors, backward=True)
        return mixed, None, None, None


def _launch_qkv(
    mixed: torch.Tensor, parts: tuple[torch.Tensor, ...], tables: tuple[torch.Tensor, ...], backward: bool
) -> None:
    s, b, groups, width = parts[1].shape
    queries, turned = mixed.shape[-1] // width - 2, tables[0].shape[-1]
    half = triton.next_power_of_2(max(turned // 2, 1))

    def block(heads: int, columns: int) -> int:
        return min(triton.next_power_of_2(heads), max(_TILE // columns, 1))

    block_d = triton.next_power_of_2(width)
    _qkv[(s * b,)](
        mixed,
        *parts,
        *tables,
        b,
        groups,
        R=queries,
        D=width,
        TURNED=turned,
        BACKWARD=backward,
        BLOCK_Q=block(groups * queries, half),
        BLOCK_K=block(groups, half),
        BLOCK_V=block(groups, block_d),
        BLOCK_HALF=half,
        BLOCK_REST=triton.next_power_of_2(max(width - turned, 1)),
        BLOCK_D=block_d,
        num_warps=4,
    )
