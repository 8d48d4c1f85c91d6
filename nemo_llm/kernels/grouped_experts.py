"""Triton kernels for many small experts at once: grouped products, weighted SwiGLU, and the sum of a token's rows.

The rows of all experts lie one behind the other (models/layers/experts.py tells how), and each product of all experts
is one launch. Nothing asks the GPU for a number of rows, so the host never waits. Each expert keeps a weight of its
own, as checkpoints have it: a kernel finds weight ``e`` at ``first weight + offsets[e]`` elements.

Imported where a GPU is used alone. Checked against float64 in Triton's interpreter (tests/models/test_kernels.py) and
on a GPU (``python -m tests.models.kernel_checks cuda experts``).

Shapes: ``T`` tokens of ``h`` columns, ``k`` experts a token, ``R = T * k`` rows, ``f`` hidden units of an expert.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

# Measured on an H200 with 128 experts of 768 and 64 of 1408 units, 512 and 768 rows an expert.
_PRODUCT_TILE = {"COLUMNS": 256, "INNER": 64, "num_warps": 8, "num_stages": 3}
_GRADIENT_TILE = {"OUTPUTS": 128, "INPUTS": 128, "ROWS": 64, "num_warps": 4, "num_stages": 3}


def _table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[E]`` int64 on the device: how many elements each tensor begins behind the first one."""
    first = tensors[0]
    return _offsets(tuple(map(torch.Tensor.data_ptr, tensors)), first.element_size(), first.device)


@lru_cache(maxsize=4096)  # a model's weights and gradient buffers stay where they are
def _offsets(addresses: tuple[int, ...], element_size: int, device: torch.device) -> torch.Tensor:
    distances = [address - addresses[0] for address in addresses]
    assert all(distance % 16 == 0 for distance in distances), "the kernels read 16 bytes at a time"
    return torch.tensor([distance // element_size for distance in distances], dtype=torch.int64, device=device)


@triton.jit
def _grouped_product(
    x,
    weight,
    offsets,
    tokens,
    starts,
    tile_experts,
    tile_rows,
    y,
    experts,
    columns,
    inner,
    weight_column_stride,
    weight_inner_stride,
    GATHER: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    # y[r] = x[r] @ W_e for the rows of a tile, where W_e[i, c] stands at the two strides. FULL: INNER divides inner.
    column_tiles = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    expert = tl.load(tile_experts + tile)
    if expert < experts:
        row = tl.load(tile_rows + tile) + tl.arange(0, ROWS)
        there = row < tl.load(starts + expert + 1)
        source = tl.load(tokens + row, there, 0) if GATHER else row
        column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        # Columns behind the last one read the first ones again, so that the loads of the loop need no mask.
        read_column = (column % columns).to(tl.int64)
        first = weight + tl.multiple_of(tl.load(offsets + expert), 8)
        step = tl.arange(0, INNER)
        left = x + tl.where(there, source, 0).to(tl.int64)[:, None] * inner + step[None, :]
        right = first + step[:, None] * weight_inner_stride + read_column[None, :] * weight_column_stride
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, inner, INNER):
            if FULL:
                a = tl.load(left)
                b = tl.load(right)
            else:
                a = tl.load(left, (begin + step < inner)[None, :], 0.0)
                b = tl.load(right, (begin + step < inner)[:, None], 0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            left += INNER
            right += INNER * weight_inner_stride
        out = y + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out, total.to(y.dtype.element_ty), there[:, None] & (column < columns)[None, :])


def grouped_product(
    x: torch.Tensor, weights: Sequence[torch.Tensor], routes: Any, transposed: bool, gather: bool
) -> torch.Tensor:
    """Each row times the weight of its expert.

    Args:
        x: ``[R, n]``, or with ``gather`` the tokens ``[T, n]``, from which each row takes its own.
        weights: one for each expert: ``[m, n]`` where ``transposed`` (``y = x @ W^T``), else ``[n, m]``.
        routes: an `experts.Routes`.

    Returns:
        ``[R, m]``.
    """
    first = weights[0]
    columns, inner = first.shape if transposed else first.shape[::-1]
    strides = (inner, 1) if transposed else (1, columns)
    y = x.new_empty(routes.rows, columns)
    _grouped_product[(routes.tile_experts.numel() * triton.cdiv(columns, _PRODUCT_TILE["COLUMNS"]),)](
        x,
        first,
        _table(weights),
        routes.tokens if gather else routes.starts,
        routes.starts,
        routes.tile_experts,
        routes.tile_rows,
        y,
        len(weights),
        columns,
        inner,
        *strides,
        GATHER=gather,
        FULL=inner % _PRODUCT_TILE["INNER"] == 0,
        PRECISION=_precision(x),
        ROWS=routes.rows_a_tile,
        **_PRODUCT_TILE,
    )
    return y


def _precision(x: torch.Tensor) -> str:
    """No rounding to TF32 where a run asks for float32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _grouped_weight_gradient(
    buffer,
    offsets,
    output_grad,
    x,
    starts,
    outputs,
    inputs,
    PRECISION: tl.constexpr,
    OVERWRITE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    output_tiles = tl.cdiv(outputs, OUTPUTS)
    input_tiles = tl.cdiv(inputs, INPUTS)
    expert = tl.program_id(0) // (output_tiles * input_tiles)
    tile = tl.program_id(0) % (output_tiles * input_tiles)
    output = (tile // input_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    input = (tile % input_tiles) * INPUTS + tl.arange(0, INPUTS)
    read_output, read_input = output % outputs, input % inputs
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for first in range(begin, end, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = (row < end)[:, None]
        a = tl.load(output_grad + row[:, None] * outputs + read_output[None, :], there, 0.0)
        b = tl.load(x + row[:, None] * inputs + read_input[None, :], there, 0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    out = buffer + tl.multiple_of(tl.load(offsets + expert), 4) + output.to(tl.int64)[:, None] * inputs + input[None, :]
    inside = (output < outputs)[:, None] & (input < inputs)[None, :]
    if not OVERWRITE:
        total += tl.load(out, inside, 0.0)
    tl.store(out, total, inside)


def add_grouped_weight_gradient(
    buffers: Sequence[torch.Tensor], output_grad: torch.Tensor, x: torch.Tensor, routes: Any, overwrite: bool
) -> None:
    """``buffer[e] += output_grad_e^T @ x_e`` for every expert; with ``overwrite`` ``=``, zero for one without rows.

    Args:
        buffers: one for each expert, ``[o, i]`` fp32.
        output_grad: ``[R, o]``.
        x: ``[R, i]``.
        routes: an `experts.Routes`.
    """
    outputs, inputs = buffers[0].shape
    tiles = triton.cdiv(outputs, _GRADIENT_TILE["OUTPUTS"]) * triton.cdiv(inputs, _GRADIENT_TILE["INPUTS"])
    _grouped_weight_gradient[(len(buffers) * tiles,)](
        buffers[0],
        _table(buffers),
        output_grad,
        x,
        routes.starts,
        outputs,
        inputs,
        PRECISION=_precision(x),
        OVERWRITE=overwrite,
        **_GRADIENT_TILE,
    )


@triton.jit
def _weighted_swiglu(x, weight, places, y, units, PLACED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row) if PLACED else row
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    gate = tl.load(x + row * 2 * units + unit, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * units + units + unit, inside, 0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up * tl.load(weight + place).to(tl.float32)
    tl.store(y + row * units + unit, result.to(y.dtype.element_ty), inside)


@triton.jit
def _weighted_swiglu_backward(dy, x, weight, places, dx, dweight, y, units, PLACED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row) if PLACED else row
    unit = tl.arange(0, BLOCK)
    inside = unit < units
    at = row * 2 * units + unit
    gate = tl.load(x + at, inside, 0.0).to(tl.float32)
    up = tl.load(x + at + units, inside, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * units + unit, inside, 0.0).to(tl.float32)
    share = tl.load(weight + place).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dweight + place, tl.sum(gradient * silu * up, 0))
    tl.store(y + row * units + unit, (silu * up * share).to(y.dtype.element_ty), inside)
    gradient *= share
    dgate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx + at, dgate.to(dx.dtype.element_ty), inside)
    tl.store(dx + at + units, (gradient * silu).to(dx.dtype.element_ty), inside)


_SWIGLU_BLOCK = 1024


def weighted_swiglu(x: torch.Tensor, weight: torch.Tensor, routes: Any) -> torch.Tensor:
    """``silu(gate) * up * weight`` of each row: ``[R, 2f]`` (all gates, then all ups) -> ``[R, f]``.

    Args:
        weight: ``[T, k]``, or ``[R]`` where the rows came from other ranks.
        routes: an `experts.Routes`.
    """
    rows, units = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, units)
    if rows:
        block = min(_SWIGLU_BLOCK, triton.next_power_of_2(units))
        placed = routes.places is not None
        places = routes.places if placed else routes.starts
        _weighted_swiglu[(rows, triton.cdiv(units, block))](x, weight, places, y, units, PLACED=placed, BLOCK=block)
    return y


def weighted_swiglu_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, routes: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``x`` and of ``weight`` (fp32) from that of the result ``[R, f]``, and the result once more."""
    rows, units = dy.shape
    dx, y = torch.empty_like(x), torch.empty_like(dy)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(units)
        placed = routes.places is not None
        places = routes.places if placed else routes.starts
        _weighted_swiglu_backward[(rows,)](
            dy, x, weight, places, dx, dweight, y, units,
            PLACED=placed, BLOCK=block, num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip
    return dx, dweight, y


@triton.jit
def _sum_rows(y, rows, out, columns, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(rows + token * CHOICES + choice).to(tl.int64)
        total += tl.load(y + row * columns + column, inside, 0.0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), inside)


_SUM_BLOCK = 2048


def sum_of_rows(y: torch.Tensor, routes: Any) -> torch.Tensor:
    """The sum of each token's rows: ``[R, h]`` -> ``[T, h]``, added in fp32 in the order of the token's choices."""
    tokens, choices = routes.rows_of_token.shape
    out = y.new_empty(tokens, y.shape[1])
    if tokens:
        block = min(_SUM_BLOCK, triton.next_power_of_2(y.shape[1]))
        _sum_rows[(tokens, triton.cdiv(y.shape[1], block))](
            y, routes.rows_of_token, out, y.shape[1], CHOICES=choices, BLOCK=block, num_warps=4
        )
    return out
