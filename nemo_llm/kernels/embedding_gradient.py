"""Gradient of the embedding straight into a float32 buffer, as one Triton kernel.

PyTorch's makes a whole table in the weight's dtype, most of it zeros, and adds that to the buffer. Here the rows that
belong to the same token are added up in float32, in their order, and then to the token's row: the same bits every time.
"""

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS = 8, 1024  # of a tile


@triton.jit
def _add_rows(buffer, gradient, tokens, order, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``tokens`` are sorted, ``order`` says where each stood; the first of a run of equal tokens adds up the run."""
    start = tl.program_id(0)
    token = tl.load(tokens + start)
    before = tl.load(tokens + start - 1, start > 0, -1)
    if (token >= 0) & (token != before):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        total = tl.zeros([COLUMNS], tl.float32)
        first = start
        found = ROWS
        while found == ROWS:
            at = first + tl.arange(0, ROWS)
            same = tl.load(tokens + at, at < count, -1) == token
            row = tl.load(order + at, same, 0)
            there = same[:, None] & inside[None, :]
            values = tl.load(gradient + row[:, None] * columns + column[None, :], there, 0.0)
            total += tl.sum(values.to(tl.float32), 0)
            found = tl.sum(same.to(tl.int32), 0)
            first += ROWS
        place = buffer + token * columns + column
        tl.store(place, tl.load(place, inside, 0.0) + total, inside)


def add_rows(buffer: torch.Tensor, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
    """``buffer[tokens] += gradient``: ``[v, h]`` float32, ``[T]`` and ``[T, h]``; negative tokens are left out."""
    ordered, order = torch.sort(tokens, stable=True)
    count, columns = gradient.shape
    grid = (count, triton.cdiv(columns, _COLUMNS))
    _add_rows[grid](
        buffer, gradient.contiguous(), ordered, order, count, columns, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
    )
