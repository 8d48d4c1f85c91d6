"""Triton kernels that bring a matrix to FP8: its largest value, then the scaled matrix and its transpose."""

import torch
import triton
import triton.language as tl

_SMALLEST_MAXIMUM: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _largest(x, out, elements, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for block in range(BLOCKS):
        at = start + block * BLOCK + offsets
        largest = tl.maximum(largest, tl.abs(tl.load(x + at, at < elements, 0.0).to(tl.float32)))
    tl.atomic_max(out, tl.max(largest, 0))


@triton.jit
def _scale_and_transpose(
    x, largest_in, rows_out, columns_out, factor_out, m, k, limit, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    largest = tl.maximum(tl.load(largest_in), _SMALLEST_MAXIMUM)
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    if row_block == 0 and column_block == 0:
        tl.store(factor_out, largest / limit)
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    values = tl.load(x + rows[:, None] * k + columns[None, :], inside, 0.0).to(tl.float32)
    values = tl.clamp(values * (limit / largest), -limit, limit).to(rows_out.dtype.element_ty)
    tl.store(rows_out + rows[:, None] * k + columns[None, :], values, inside)
    turned = tl.trans(values)
    inside = (rows[None, :] < m) & (columns[:, None] < k)
    tl.store(columns_out + columns[:, None] * m + rows[None, :], turned, inside)


def quantize_on_gpu(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x`` [m, k], contiguous -> its FP8 rows [m, k], columns [k, m] and the float32 factor that undoes the scale."""
    m, k = x.shape
    largest = torch.zeros(1, dtype=torch.float32, device=x.device)
    factor = torch.empty_like(largest)
    block, blocks = 4096, 8
    _largest[(triton.cdiv(x.numel(), block * blocks),)](x, largest, x.numel(), BLOCK=block, BLOCKS=blocks, num_warps=8)
    rows = torch.empty(m, k, dtype=dtype, device=x.device)
    columns = torch.empty(k, m, dtype=dtype, device=x.device)
    grid = (triton.cdiv(m, 128), triton.cdiv(k, 128))
    _scale_and_transpose[grid](
        x, largest, rows, columns, factor, m, k, torch.finfo(dtype).max, BLOCK_M=128, BLOCK_K=128, num_warps=8
    )
    return rows, columns, factor
