"""Megatron's linear layers where one tensor-parallel rank holds the whole weight: nothing but our products."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from nemo_llm.kernels.matmul import add_weight_gradient, input_gradient, project
from nemo_llm.models.layers.main_grad import gradient_buffer, returned_gradient


class WholeLinear:
    """Mixed into Megatron's linear modules: without communication what is left of them is a product."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    skip_bias_add: bool

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight^T``: [T, i] -> [T, o]."""
        return LinearProduct.apply(x, self.weight)

    def forward(self, input_: torch.Tensor, *_megatrons: Any, **_settings: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, i] -> [s, b, o], and the bias where it is added later."""
        output = self.product(input_.flatten(0, -2)).view(*input_.shape[:-1], -1)
        if self.bias is None or self.skip_bias_add:
            return output, self.bias
        return output + self.bias, None


class LinearProduct(torch.autograd.Function):
    """``x @ weight^T``; the weight's gradient goes straight into ``main_grad`` where there is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x`` [T, i], ``weight`` [o, i] -> [T, o]."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        # Not saved: under hooks for saved tensors (activation_offload) what comes back is a copy without ``main_grad``.
        ctx.weight = weight
        return project(x, weight)

    @staticmethod
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of ``x`` and of the weight."""
        (x,), weight = ctx.saved_tensors, ctx.weight
        output_grad = output_grad.contiguous()
        x_grad = input_gradient(output_grad, weight) if ctx.needs_input_grad[0] else None
        if x is None:
            return x_grad, None
        buffer = gradient_buffer(weight)
        add_weight_gradient(buffer, output_grad, x)
        return x_grad, returned_gradient(weight, buffer)


class WholeColumnLinear(WholeLinear, ColumnParallelLinear):
    """Megatron's column-parallel linear layer on one rank."""


class WholeRowLinear(WholeLinear, RowParallelLinear):
    """Megatron's row-parallel linear layer on one rank."""


def weights_with_product(model: torch.nn.Module, *products: Callable[..., Any]) -> Iterator[torch.nn.Parameter]:
    """Weights of the linear layers of our own whose ``product`` is one of these; layers in four bits have none."""
    for module in model.modules():
        ours = isinstance(module, WholeLinear) and type(module).product in products
        if ours and getattr(module, "weight", None) is not None:
            yield module.weight
