"""Attention of one new token of each row over its cached keys and values, as two Triton kernels (flash decoding).

The cache of a row is cut into parts that are attended to at the same time, each with its own softmax; a second kernel
joins them (Dao et al., "Flash-Decoding", 2023; the rule is that of arXiv:1805.02867). A row reads its own length alone
and keeps its new key and value on the way. Checked against float64 in tests/models/kernel_checks.py.

Shapes: ``b`` rows, ``g`` key-value heads, ``R`` query heads of each, ``D`` head size, ``S`` slots.
"""

import torch
import triton
import triton.language as tl

PART_SLOTS = 256
"""Slots that one program attends to."""
# Bytes of keys that a program holds at a time: a multiple of it (values, loads under way) fits on the chip.
_BLOCK_BYTES = 16384
# tl.dot takes no fewer rows than this.
_LEAST_ROWS = 16


@triton.jit
def _attend_part(
    q,
    new_key,
    new_value,
    keys,
    values,
    positions,
    weighted,
    largest,
    total,
    groups,
    slots,
    scale,
    window,
    cap,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # row * groups + group
    part = tl.program_id(1)
    position = tl.load(positions + head // groups).to(tl.int32)
    first = part * PART
    query = tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    q_here = (query[:, None] < R) & (channel[None, :] < D)
    place = (head * tl.num_programs(1) + part) * R + query
    seen_from = 0
    if WINDOW:
        seen_from = tl.maximum(position - window + 1, 0)
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if (first <= position) & (first + PART > seen_from):
        q_part = tl.load(q + (head * R + query[:, None]) * D + channel[None, :], q_here, 0.0)
        key_now = tl.load(new_key + head * D + channel, channel < D, 0.0)
        value_now = tl.load(new_value + head * D + channel, channel < D, 0.0)
        if position < first + PART:
            at = (head * slots + position) * D + channel
            tl.store(keys + at, key_now, channel < D)
            tl.store(values + at, value_now, channel < D)
        end = tl.minimum(first + PART, position + 1)
        for start in range(first, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            seen = (slot <= position) & (slot >= seen_from)
            here = seen[:, None] & (channel[None, :] < D)
            at = (head * slots + slot[:, None]) * D + channel[None, :]
            now = (slot == position)[:, None]
            k = tl.where(now, key_now[None, :], tl.load(keys + at, here, 0.0))
            v = tl.where(now, value_now[None, :], tl.load(values + at, here, 0.0))
            logits = tl.dot(q_part, tl.trans(k), input_precision="ieee") * scale
            if CAP:
                logits = cap * (2.0 * tl.sigmoid(2.0 * logits / cap) - 1.0)
            logits = tl.where(seen[None, :], logits, float("-inf"))
            m_new = tl.maximum(m, tl.max(logits, 1))
            # A block that the window hides wholly leaves -inf, of which nothing may be subtracted.
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            weights = tl.exp(logits - base[:, None])
            shrink = tl.exp(m - base)
            s = s * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            m = m_new
    tl.store(largest + place, m, query < R)
    tl.store(total + place, s, query < R)
    tl.store(weighted + place[:, None] * D + channel[None, :], acc, q_here)


@triton.jit
def _join_parts(
    weighted, largest, total, out, parts, R: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    query = tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    here = (query[:, None] < R) & (channel[None, :] < D)
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for part in range(parts):
        place = (head * parts + part) * R + query
        m_part = tl.load(largest + place, query < R, float("-inf"))
        m_new = tl.maximum(m, m_part)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        shrink, factor = tl.exp(m - base), tl.exp(m_part - base)
        s = s * shrink + factor * tl.load(total + place, query < R, 0.0)
        piece = tl.load(weighted + place[:, None] * D + channel[None, :], here, 0.0)
        acc = acc * shrink[:, None] + factor[:, None] * piece
        m = m_new
    acc = acc / tl.where(s == 0.0, 1.0, s)[:, None]
    tl.store(out + (head * R + query[:, None]) * D + channel[None, :], acc.to(out.dtype.element_ty), here)


def attend_to_cache(
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    cached: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    seen_slots: int,
    rule: tuple[float, int | None, float | None],
) -> torch.Tensor:
    """Keep each row's new key and value in its slot, and attend to all its slots so far.

    Args:
        query: ``[b, g * R, D]``.
        new: key and value of the present token, ``[b, g, D]`` each.
        cached: keys and values, ``[b, g, S, D]`` each, contiguous.
        positions: ``[b]`` int64, the slot of each row's present token.
        seen_slots: no position reaches this.
        rule: (factor on the logits, window or None, soft cap of the logits or None).

    Returns:
        ``[b, g * R, D]``
    """
    keys, values = cached
    rows, groups, slots, width = keys.shape
    per_group = query.shape[1] // groups
    parts = triton.cdiv(seen_slots, PART_SLOTS)
    shape = (rows * groups, parts, per_group)
    weighted = torch.empty(*shape, width, dtype=torch.float32, device=query.device)
    largest, total = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    scale, window, cap = rule
    block_r = max(triton.next_power_of_2(per_group), _LEAST_ROWS)
    block_d = max(triton.next_power_of_2(width), 16)
    block_slots = min(64, max(16, _BLOCK_BYTES // (block_d * keys.element_size())))
    _attend_part[(rows * groups, parts)](
        query.contiguous(),
        new[0].contiguous(),
        new[1].contiguous(),
        keys,
        values,
        positions,
        weighted,
        largest,
        total,
        groups,
        slots,
        scale,
        window or 0,
        cap or 1.0,
        R=per_group,
        D=width,
        WINDOW=window is not None,
        CAP=cap is not None,
        PART=PART_SLOTS,
        BLOCK=block_slots,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )
    _join_parts[(rows * groups,)](
        weighted, largest, total, out, parts, R=per_group, D=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4
    )
    return out
