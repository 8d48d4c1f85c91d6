"""The three matrix products of a linear layer, each by the kernel that was fastest for its shape on this GPU.

`choose_kernels` times cuBLASLt's kernels (kernels/cublaslt.py) before training begins and keeps for each shape one that
is faster than PyTorch's choice and gives the same bits; elsewhere, and for every shape that it was not asked about,
PyTorch does the product. So a choice, which noise can turn, never changes what is computed. A training step runs at the
power limit, where other kernels are the fastest than in a burst: the last choice is between long runs.

Shapes: ``T`` tokens, ``i`` inputs and ``o`` outputs of the layer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import torch

from nemo_llm.kernels.cublaslt import Product, ProductShape

_MARGIN = 0.985  # of PyTorch's time; what is nearer is noise
_FINALISTS = 3
_BURST_SECONDS, _LONG_SECONDS = 0.01, 0.08
_ROUNDS = 3
_EXPECTED_FLOPS = 700e12  # a second; says how often a product fits into these
_LEAST_FLOPS = 2e10  # below that it is not the product that takes the time


@cache
def _chosen_kernels(_device: torch.device) -> dict[ProductShape, Product]:
    """What `choose_kernels` has kept for a device."""
    return {}


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight^T``: [T, i] and [o, i] -> [T, o]."""
    product = _find(_projection(x.shape[0], weight), x, weight)
    return x @ weight.t() if product is None else _run(product, x, weight, x.new_empty(x.shape[0], weight.shape[0]))


def input_gradient(output_grad: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``output_grad @ weight``: [T, o] and [o, i] -> [T, i], written to ``out`` if given."""
    if out is None:
        out = output_grad.new_empty(output_grad.shape[0], weight.shape[1])
    product = _find(_input_gradient(output_grad.shape[0], weight), output_grad, weight, out)
    return torch.mm(output_grad, weight, out=out) if product is None else _run(product, output_grad, weight, out)


def take_stale(buffer: torch.Tensor) -> bool:
    """Whether this buffer holds the gradient of an earlier step, to be overwritten; from now on it does not."""
    stale = getattr(buffer, "stale", False)
    if stale:
        buffer.stale = False
    return stale


def add_weight_gradient(buffer: torch.Tensor, output_grad: torch.Tensor, inputs: torch.Tensor) -> None:
    """``buffer += output_grad^T @ inputs``: ``[o, i]`` fp32, ``[T, o]`` and ``[T, i]`` in any dtype; = if it is stale.

    On CUDA the matrix product reads bf16 and adds in fp32, in one kernel.
    """
    overwrite = take_stale(buffer)
    if inputs.shape[0] == 0:  # an expert that no token chose
        if overwrite:
            buffer.zero_()
        return
    product = _find(_weight_gradient(inputs.shape[0], buffer), output_grad, inputs, buffer)
    beta = 0 if overwrite else 1
    if product is not None:
        product.run(output_grad, inputs, buffer, overwrite=overwrite)
    elif output_grad.dtype == buffer.dtype:
        buffer.addmm_(output_grad.t(), inputs, beta=beta)
    elif buffer.is_cuda:
        torch.addmm(buffer, output_grad.t(), inputs, out_dtype=buffer.dtype, beta=beta, out=buffer)
    else:
        buffer.addmm_(output_grad.t().to(buffer.dtype), inputs.to(buffer.dtype), beta=beta)


def shapes_of_linear(tokens: int, weight: torch.Tensor) -> list[ProductShape]:
    """The products of a layer with this weight ``[o, i]``; without its gradient where it is frozen."""
    shapes = [_projection(tokens, weight), _input_gradient(tokens, weight)]
    return [*shapes, _weight_gradient(tokens, weight)] if weight.requires_grad else shapes


@dataclass(frozen=True)
class Choice:
    """Milliseconds of one product by PyTorch's choice of kernel and by the one that was kept."""

    shape: ProductShape
    before: float
    after: float


def choose_kernels(shapes: Iterable[ProductShape], device: torch.device) -> list[Choice]:
    """Time the kernels for these shapes and use the fastest from now on; returns where that is not PyTorch's.

    Raises:
        OSError, AttributeError, RuntimeError: cuBLASLt cannot be used here; PyTorch does the products then.
    """
    choices = []
    for shape in sorted(set(shapes), key=str):
        if shape.flops >= _LEAST_FLOPS and (choice := _choose(shape, device)):
            choices.append(choice)
    return choices


def _projection(tokens: int, weight: torch.Tensor) -> ProductShape:
    return ProductShape(tokens, weight.shape[1], weight.shape[0], right_transposed=True)


def _input_gradient(tokens: int, weight: torch.Tensor) -> ProductShape:
    return ProductShape(tokens, weight.shape[0], weight.shape[1])


def _weight_gradient(tokens: int, weight: torch.Tensor) -> ProductShape:
    return ProductShape(weight.shape[0], tokens, weight.shape[1], left_transposed=True, accumulate=True)


def _find(shape: ProductShape, left: torch.Tensor, right: torch.Tensor, *out: torch.Tensor) -> Product | None:
    product = _chosen_kernels(left.device).get(shape)
    if product is None or left.dtype != torch.bfloat16 or right.dtype != torch.bfloat16:
        return None
    return product if product.fits(left, right, *out) else None


def _run(product: Product, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    product.run(left, right, out)
    return out


def _choose(shape: ProductShape, device: torch.device) -> Choice | None:
    """Keep the fastest kernel for this shape, if it is not PyTorch's own choice."""
    product = Product(shape, device)
    left, right = (torch.randn(*size, device=device).bfloat16() for size in (shape.left_size, shape.right_size))
    wanted, out = (torch.zeros(shape.rows, shape.columns, dtype=shape.out_dtype, device=device) for _ in range(2))
    _by_pytorch(shape, left, right, wanted)
    alike = []
    for kernel in range(len(product)):
        out.zero_()
        product.run(left, right, out, kernel)
        if torch.equal(out, wanted):
            alike.append(kernel)

    def time_of(kernels: list[int], seconds: float) -> list[float]:
        ways: list[Callable[[], None]] = [lambda: _by_pytorch(shape, left, right, out)]
        ways += [partial(product.run, left, right, out, kernel) for kernel in kernels]
        return _time(ways, max(int(seconds * _EXPECTED_FLOPS / shape.flops), 2))

    bursts = dict(zip(alike, time_of(alike, _BURST_SECONDS)[1:], strict=True))
    finalists = sorted(alike, key=bursts.__getitem__)[:_FINALISTS]
    before, *times = time_of(finalists, _LONG_SECONDS)
    after, product.chosen = min(zip(times, finalists, strict=True), default=(before, 0))
    if after > _MARGIN * before:
        return None
    _chosen_kernels(left.device)[shape] = product
    return Choice(shape, before, after)


def _by_pytorch(shape: ProductShape, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    a, b = left.t() if shape.left_transposed else left, right.t() if shape.right_transposed else right
    if shape.accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out=out)


def _time(ways: list[Callable[[], None]], times: int) -> list[float]:
    """Milliseconds of each way, the median of rounds in which all take turns: the clock follows heat and power."""
    rounds: list[list[float]] = [[] for _ in ways]
    for _ in range(_ROUNDS):
        for way, results in zip(ways, rounds, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            way()
            begin.record()
            for _ in range(times):
                way()
            end.record()
            end.synchronize()
            results.append(begin.elapsed_time(end) / times)
    return [sorted(results)[_ROUNDS // 2] for results in rounds]
