"""Triton kernels of the torch backend: norms with their residual, and SwiGLU.

Each does in one pass over memory what PyTorch does in several; arithmetic in float32, one rounding at the end. Imported
where a GPU is used alone. Checked against float64 in Triton's interpreter (tests/models/test_kernels.py) and on a GPU
(``python -m tests.models.kernel_checks cuda``).

Shapes: ``T`` tokens, ``h`` columns, ``f`` hidden units of the MLP.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Programs of the norm's backward pass. Each sums the weight gradients of its rows: more programs, more partial sums.
_PROGRAMS_PER_MULTIPROCESSOR = 4
_LONGEST_HEAD, _SHORT_TILE = 256, 2048  # columns of a head; elements of a tile of heads


@triton.jit
def _norm_forward(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    mean_out,
    scale_out,
    rows,
    columns,
    eps,
    RESIDUAL: tl.constexpr,
    LAYER: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    offsets = tl.arange(0, BLOCK)[None, :]
    known, there = offsets < columns, row < rows
    inside = known & there
    values = tl.load(x + row * columns + offsets, inside, 0.0).to(tl.float32)
    if RESIDUAL:
        values += tl.load(residual + row * columns + offsets, inside, 0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * columns + offsets, rounded, inside)
        values = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(values, 1, keep_dims=True) / columns
        tl.store(mean_out + row, mean, there)
        values = tl.where(inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1, keep_dims=True) / columns + eps)
    tl.store(scale_out + row, scale, there)
    w = tl.load(weight + offsets, known, 0.0).to(tl.float32)
    if ZERO_CENTERED:
        w += 1.0
    values = values * scale * w
    if LAYER:
        values += tl.load(bias + offsets, known, 0.0).to(tl.float32)
    tl.store(y + row * columns + offsets, values.to(y.dtype.element_ty), inside)


@triton.jit
def _norm_backward(
    dy,
    dtotal,
    total,
    weight,
    mean_in,
    scale_in,
    dx,
    dweight,
    dbias,
    rows,
    columns,
    PASSED_ON: tl.constexpr,
    LAYER: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    TILES_A_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)[None, :]
    known = offsets < columns
    w = tl.load(weight + offsets, known, 0.0).to(tl.float32)
    if ZERO_CENTERED:
        w += 1.0
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for index in range(TILES_A_PROGRAM):
        row = ((tl.cast(index, tl.int64) * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS))[:, None]
        there = row < rows
        inside = known & there
        at = row * columns + offsets
        gradient = tl.load(dy + at, inside, 0.0).to(tl.float32)
        values = tl.load(total + at, inside, 0.0).to(tl.float32)
        scale = tl.load(scale_in + row, there, 0.0)
        if LAYER:
            values = values - tl.load(mean_in + row, there, 0.0)
        normed = tl.where(inside, values * scale, 0.0)
        weight_sum += gradient * normed
        if LAYER:
            bias_sum += gradient
        gradient = gradient * w
        change = gradient - normed * (tl.sum(gradient * normed, 1, keep_dims=True) / columns)
        if LAYER:
            change -= tl.sum(gradient, 1, keep_dims=True) / columns
        change = change * scale
        if PASSED_ON:
            change += tl.load(dtotal + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, change.to(dx.dtype.element_ty), inside)
    tl.store(dweight + program * columns + offsets, tl.sum(weight_sum, 0, keep_dims=True), known)
    if LAYER:
        tl.store(dbias + program * columns + offsets, tl.sum(bias_sum, 0, keep_dims=True), known)


class FusedNorm(torch.autograd.Function):
    """RMSNorm or LayerNorm of ``x + residual``; also returns the sum, whose gradient joins in the same kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rule: tuple[float, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` and ``residual`` [..., h], ``weight`` and ``bias`` [h], ``rule`` = (eps, zero-centred weight).

        Returns:
            the normed sum and the sum, both ``[..., h]``; without ``residual`` the sum is ``x`` itself.
        """
        eps, zero_centered = rule
        given, x = x, x.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        y = torch.empty_like(x)
        # Kept as it was given: heads that are views of a projection's output are not kept twice.
        total = given if residual is None else torch.empty_like(x)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(scale) if bias is not None else scale
        block = triton.next_power_of_2(columns)
        rows_a_tile = _rows_a_tile(block)
        _norm_forward[(triton.cdiv(rows, rows_a_tile),)](
            x,
            x if residual is None else residual.contiguous(),
            weight,
            weight if bias is None else bias,
            y,
            x if residual is None else total,
            mean,
            scale,
            rows,
            columns,
            eps,
            RESIDUAL=residual is not None,
            LAYER=bias is not None,
            ZERO_CENTERED=zero_centered,
            ROWS=rows_a_tile,
            BLOCK=block,
            num_warps=_warps(block * rows_a_tile),
        )
        ctx.save_for_backward(total, weight, mean, scale)
        ctx.rule = (residual is not None, bias is not None, zero_centered)
        ctx.set_materialize_grads(False)
        return y, given.view_as(given) if residual is None else total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """One gradient for both addends, and those of weight and bias."""
        total, weight, mean, scale = ctx.saved_tensors
        total = total.contiguous()
        had_residual, layer, zero_centered = ctx.rule
        columns = total.shape[-1]
        rows = total.numel() // columns
        block = triton.next_power_of_2(columns)
        rows_a_tile = _rows_a_tile(block)
        tiles = triton.cdiv(rows, rows_a_tile)
        programs = min(tiles, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(total.device))
        dx = torch.empty_like(total)
        dweight = torch.empty(programs, columns, dtype=torch.float32, device=total.device)
        dbias = torch.empty_like(dweight) if layer else dweight
        _norm_backward[(programs,)](
            dy.contiguous(),
            dy if dtotal is None else dtotal.contiguous(),
            total,
            weight,
            mean,
            scale,
            dx,
            dweight,
            dbias,
            rows,
            columns,
            PASSED_ON=dtotal is not None,
            LAYER=layer,
            ZERO_CENTERED=zero_centered,
            TILES_A_PROGRAM=triton.cdiv(tiles, programs),
            ROWS=rows_a_tile,
            BLOCK=block,
            num_warps=_warps(block * rows_a_tile),
        )
        bias_gradient = dbias.sum(0).to(weight.dtype) if layer else None
        return dx, dx if had_residual else None, dweight.sum(0).to(weight.dtype), bias_gradient, None


def _rows_a_tile(block: int) -> int:
    """One of hidden states; several of heads, which alone are too short for a program."""
    return max(_SHORT_TILE // block, 1) if block <= _LONGEST_HEAD else 1


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _swiglu_forward(x, bias, y, units, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < units
    gate = tl.load(x + row * 2 * units + offsets, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * units + units + offsets, inside, 0.0).to(tl.float32)
    if BIAS:
        gate += tl.load(bias + offsets, inside, 0.0).to(tl.float32)
        up += tl.load(bias + units + offsets, inside, 0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(y + row * units + offsets, result.to(y.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(dy, x, bias, dx, units, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < units
    at = row * 2 * units + offsets
    gate = tl.load(x + at, inside, 0.0).to(tl.float32)
    up = tl.load(x + at + units, inside, 0.0).to(tl.float32)
    if BIAS:
        gate += tl.load(bias + offsets, inside, 0.0).to(tl.float32)
        up += tl.load(bias + units + offsets, inside, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * units + offsets, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = gradient * gate * sigmoid
    tl.store(dx + at, dgate.to(dx.dtype.element_ty), inside)
    tl.store(dx + at + units, dup.to(dx.dtype.element_ty), inside)


_SWIGLU_BLOCK = 1024


class FusedSwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (arXiv:2002.05202) of ``x + bias``, whose columns are all gates and then all ups."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` [T, 2f], ``bias`` [2f] -> [T, f]."""
        x = x.contiguous()
        rows, units = x.shape[0], x.shape[1] // 2
        y = torch.empty(rows, units, dtype=x.dtype, device=x.device)
        if rows:
            grid = (rows, triton.cdiv(units, _SWIGLU_BLOCK))
            _swiglu_forward[grid](
                x, x if bias is None else bias, y, units, BIAS=bias is not None, BLOCK=_SWIGLU_BLOCK, num_warps=4
            )
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, f] -> [T, 2f] and [2f]."""
        x, bias = ctx.saved_tensors
        rows, units = x.shape[0], x.shape[1] // 2
        dx = torch.empty_like(x)
        if rows:
            grid = (rows, triton.cdiv(units, _SWIGLU_BLOCK))
            _swiglu_backward[grid](
                dy.contiguous(),
                x,
                x if bias is None else bias,
                dx,
                units,
                BIAS=bias is not None,
                BLOCK=_SWIGLU_BLOCK,
                num_warps=4,
            )
        return dx, None if bias is None else dx.sum(0).to(bias.dtype)
