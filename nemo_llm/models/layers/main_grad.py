"""Weight gradients added straight into Megatron's fp32 gradient buffer, without a bf16 copy in between."""

import torch

from nemo_llm.kernels.matmul import add_weight_gradient


def gradient_buffer(weight: torch.Tensor) -> torch.Tensor:
    """Megatron's fp32 buffer of this weight's gradient, else a buffer of our own, zeros."""
    if hasattr(weight, "main_grad"):
        return weight.main_grad
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def returned_gradient(weight: torch.Tensor, gradient: torch.Tensor | None, tied: bool = False) -> torch.Tensor | None:
    """What autograd is given for the weight.

    Megatron's gradient hooks fire when autograd delivers something. A gradient that is in ``main_grad`` already is
    announced by an empty one, as Megatron's own fused layers do; a weight that is the embedding of this chunk too gets
    its delivery from there (``tied``).
    """
    if gradient is None:
        return None
    if not hasattr(weight, "main_grad"):
        return gradient.to(weight.dtype)
    if tied:
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def accumulate(inputs: torch.Tensor, output_grad: torch.Tensor, buffer: torch.Tensor) -> None:
    """`add_weight_gradient` with the arguments of apex's kernel."""
    add_weight_gradient(buffer, output_grad, inputs)
