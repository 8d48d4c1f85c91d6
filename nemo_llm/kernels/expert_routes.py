"""Triton kernels that put (token, expert) pairs in the order of their experts, from the router's map.

Two passes over the map count and place, instead of two sorts and a dozen small operations, for which the GPU waited on
the host. What they return is exact, so that models/layers/experts.py has the same from PyTorch's own operations on a
CPU. Checked in Triton's interpreter and on a GPU (``python -m tests.models.kernel_checks cuda routes``).

Shapes: ``T`` tokens, ``E`` experts, ``k`` experts a token, ``R = T * k`` rows.
"""

import torch
import triton
import triton.language as tl

_MAP_TILE = 8192  # elements of the map that a program holds
_MOST_TOKENS = 64
_TILES = 32  # that a program finds


@triton.jit
def _map_tile(chosen, block, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    token, expert = block * TOKENS + tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    return token, expert, tl.load(chosen + token[:, None] * experts + expert[None, :], inside, 0).to(tl.int32)


@triton.jit
def _count_rows(chosen, counts, tokens, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    _, expert, tile = _map_tile(chosen, block, tokens, experts, TOKENS, EXPERTS)
    tl.store(counts + expert * blocks + block, tl.sum(tile, 0), expert < experts)


@triton.jit
def _place_rows(
    chosen,
    counts,
    ends,
    starts,
    token_of_row,
    place_of_row,
    rows_of_token,
    expert_of_choice,
    tokens,
    experts,
    choices,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.num_programs(0)
    token, expert, tile = _map_tile(chosen, block, tokens, experts, TOKENS, EXPERTS)
    known = expert < experts
    begin = tl.load(ends + expert * blocks + block, known, 0) - tl.load(counts + expert * blocks + block, known, 0)
    row = begin[None, :] + tl.cumsum(tile, 0) - tile
    place = token[:, None] * choices + tl.cumsum(tile, 1) - tile
    here = tile > 0
    tl.store(token_of_row + row, tl.broadcast_to(token[:, None], [TOKENS, EXPERTS]), here)
    tl.store(place_of_row + row, place, here)
    tl.store(rows_of_token + place, row, here)
    tl.store(expert_of_choice + place, tl.broadcast_to(expert[None, :], [TOKENS, EXPERTS]).to(tl.int64), here)
    if block == 0:
        tl.store(starts + expert, begin, known)
        tl.store(starts + experts, tokens * choices)


def routes_of_map(chosen: torch.Tensor, choices: int) -> tuple[torch.Tensor, ...]:
    """Rows sorted by expert, within an expert by token, and a token's choices by expert.

    Args:
        chosen: ``[T, E]`` bool with ``choices`` of each row set.

    Returns:
        int32: first row of each expert, then ``R`` ``[E + 1]``; token of each row ``[R]``; ``token * k + choice`` of
        each row ``[R]``; rows of each token ``[T, k]``. int64: experts of each token ``[T, k]``.
    """
    tokens, experts = chosen.shape
    like = {"dtype": torch.int32, "device": chosen.device}
    starts, rows = torch.empty(experts + 1, **like), torch.empty(3, tokens * choices, **like)
    expert_of_choice = torch.empty(tokens, choices, dtype=torch.int64, device=chosen.device)
    width = triton.next_power_of_2(experts)
    shape = {"TOKENS": min(_MOST_TOKENS, max(_MAP_TILE // width, 1)), "EXPERTS": width}
    blocks = triton.cdiv(tokens, shape["TOKENS"])
    counts, chosen = torch.empty(experts * blocks, **like), chosen.contiguous().view(torch.uint8)
    _count_rows[(blocks,)](chosen, counts, tokens, experts, **shape)
    ends = counts.cumsum(0, dtype=torch.int32)
    _place_rows[(blocks,)](
        chosen, counts, ends, starts, *rows.unbind(), expert_of_choice, tokens, experts, choices, **shape
    )
    return starts, rows[0], rows[1], rows[2].view(tokens, choices), expert_of_choice


@triton.jit
def _find_tiles(
    starts, tile_experts, tile_rows, tiles, experts, ROWS: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr
):
    expert = tl.arange(0, EXPERTS)
    known = expert < experts
    start = tl.load(starts + expert, known, 0)
    needed = (tl.load(starts + expert + 1, known, 0) - start + ROWS - 1) // ROWS
    end = tl.cumsum(needed, 0)
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    found = tl.sum((known[None, :] & (end[None, :] <= number[:, None])).to(tl.int32), 1)
    mine = expert[None, :] == tl.minimum(found, experts - 1)[:, None]
    first = tl.sum(tl.where(mine, (start - (end - needed) * ROWS)[None, :], 0), 1)
    tl.store(tile_experts + number, found, number < tiles)
    tl.store(tile_rows + number, first + number * ROWS, number < tiles)


def tiles_of_rows(starts: torch.Tensor, tiles: int, rows_a_tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert and first row of each tile, int32 ``[tiles]``; ``E`` for the expert of a tile that is not needed.

    Args:
        starts: ``[E + 1]`` int32, the first row of each expert, then their number.
    """
    experts = starts.numel() - 1
    found = torch.empty(2, tiles, dtype=torch.int32, device=starts.device)
    _find_tiles[(triton.cdiv(tiles, _TILES),)](
        starts, *found.unbind(), tiles, experts, ROWS=rows_a_tile, TILES=_TILES, EXPERTS=triton.next_power_of_2(experts)
    )
    return found[0], found[1]
