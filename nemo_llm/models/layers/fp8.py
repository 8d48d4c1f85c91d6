"""FP8 matrix products of the torch backend: per-tensor current scaling, over ``torch._scaled_mm``.

Each product of a layer's linear modules (forward, gradient of the input, gradient of the weight) reads FP8 (E4M3 for
inputs and weights, E5M2 or E4M3 for gradients; arXiv:2209.05433) and adds in float32. A tensor's scale comes from its
own largest value at each use, so there is no scaling state: nothing to save, nothing that a resume or a changed layout
could lose. Inputs are kept for the backward pass in FP8, half the size of bf16. Embedding, attention, norms and the
output projection stay in bf16.

On CPU the same rounding is done and the products are taken in float32, for tests.

Shapes: ``T`` tokens, ``k`` inputs and ``n`` outputs of a linear layer; products need multiples of 16 of each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from nemo_llm.kernels.matmul import take_stale
from nemo_llm.models.layers.linear import WholeLinear
from nemo_llm.models.layers.main_grad import gradient_buffer, returned_gradient

_SMALLEST_MAXIMUM = 1e-12  # of a tensor of zeros: its scale must stay finite


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8: ``rows`` [m, k], ``columns`` [k, m] (its transpose, laid out in memory as such), and the factor
    (float32, one element) that gives back the values."""

    rows: torch.Tensor
    columns: torch.Tensor
    factor: torch.Tensor


def quantize(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """[m, k] in bf16 or fp32 -> FP8, scaled so that the largest value becomes the largest of ``dtype``."""
    if x.is_cuda:
        from nemo_llm.kernels.fp8_quantize import quantize_on_gpu

        return Quantized(*quantize_on_gpu(x.contiguous(), dtype))
    largest = x.detach().abs().amax().float().clamp(min=_SMALLEST_MAXIMUM)
    limit = torch.finfo(dtype).max
    rows = (x.float() * (limit / largest)).clamp(-limit, limit).to(dtype)
    return Quantized(rows, rows.t().contiguous(), (largest / limit).reshape(1))


def multiply(
    left: tuple[torch.Tensor, torch.Tensor],
    right: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    fast: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``left @ right^T``: FP8 [m, k] and [n, k] with their factors -> [m, n] in ``dtype``, written to ``out`` if given.

    Args:
        fast: let the tensor cores add in fewer bits, as is done in forward passes.
    """
    (a, a_factor), (b, b_factor) = left, right
    if not a.is_cuda:
        product = ((a.float() @ b.float().t()) * (a_factor * b_factor)).to(dtype)
        return product if out is None else out.copy_(product)
    # Private in PyTorch 2.10 to 2.13, which has no public FP8 product; tests/models/test_fp8.py holds its signature.
    return torch._scaled_mm(a, b.t(), scale_a=a_factor, scale_b=b_factor, out_dtype=dtype, use_fast_accum=fast, out=out)


class Fp8Product(torch.autograd.Function):
    """``x @ weight^T`` with all three products in FP8."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, gradient_dtype: torch.dtype) -> torch.Tensor:
        """``x`` [T, k], ``weight`` [n, k] -> [T, n] in the dtype of ``x``."""
        inputs, weights = quantize(x, torch.float8_e4m3fn), quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(inputs.columns, inputs.factor, weights.columns, weights.factor)
        ctx.weight, ctx.gradient_dtype = weight, gradient_dtype
        return multiply((inputs.rows, inputs.factor), (weights.rows, weights.factor), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Gradient of ``x``; the weight's is added to ``main_grad`` where there is one, and announced."""
        inputs, inputs_factor, weights, weights_factor = ctx.saved_tensors
        gradient = quantize(output_grad, ctx.gradient_dtype)
        x_grad = multiply((gradient.rows, gradient.factor), (weights, weights_factor), output_grad.dtype)
        weight: torch.Tensor = ctx.weight
        if not ctx.needs_input_grad[1]:
            return x_grad, None, None
        factors = ((gradient.columns, gradient.factor), (inputs, inputs_factor))
        buffer = gradient_buffer(weight)
        if take_stale(buffer):
            multiply(*factors, torch.float32, out=buffer)
        else:
            buffer.add_(multiply(*factors, torch.float32))
        return x_grad, returned_gradient(weight, buffer), None


class Fp8Linear(WholeLinear):
    """What both linear modules share; one tensor-parallel rank holds the whole weight (config/checks/recipe.py)."""

    gradient_dtype: torch.dtype

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return Fp8Product.apply(x, self.weight, self.gradient_dtype)


class HybridColumnLinear(Fp8Linear, ColumnParallelLinear):
    """Megatron's column-parallel linear layer in FP8; gradients in E5M2."""

    gradient_dtype = torch.float8_e5m2


class HybridRowLinear(Fp8Linear, RowParallelLinear):
    """Megatron's row-parallel linear layer in FP8; gradients in E5M2."""

    gradient_dtype = torch.float8_e5m2


class E4m3ColumnLinear(Fp8Linear, ColumnParallelLinear):
    """Megatron's column-parallel linear layer in FP8; gradients in E4M3."""

    gradient_dtype = torch.float8_e4m3fn


class E4m3RowLinear(Fp8Linear, RowParallelLinear):
    """Megatron's row-parallel linear layer in FP8; gradients in E4M3."""

    gradient_dtype = torch.float8_e4m3fn


LINEARS: dict[str, tuple[type, type]] = {
    "hybrid": (HybridColumnLinear, HybridRowLinear),
    "e4m3": (E4m3ColumnLinear, E4m3RowLinear),
}
