"""Norms of the torch backend. Their weights are marked for Megatron's sequence parallelism, on any device."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension, as ``config`` says.

    Args:
        config: Megatron's configuration (``normalization``, ``layernorm_zero_centered_gamma``, ``params_dtype``).
        hidden_size: length of the last dimension.
        eps: added to the variance.
        fused: on CUDA the Triton kernel, which adds the residual in the same pass.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, fused: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.fused = hidden_size, eps, fused
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            # Under sequence parallelism each rank sees its part of the tokens: Megatron sums these gradients over TP.
            parameter.sequence_parallel = config.sequence_parallel

    def forward(
        self, x: torch.Tensor, *, residual: torch.Tensor | None = None, return_sum: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Norm of ``x + residual``: [..., hidden_size] -> the same shape and dtype; statistics in float32.

        With ``return_sum`` the sum comes second (``x`` itself without a residual): let what follows use that one, and
        its gradient is added in the kernel that computes the norm's.
        """
        if self.fused and x.is_cuda:
            from nemo_llm.kernels.norm_swiglu import FusedNorm

            normed, total = FusedNorm.apply(x, residual, self.weight, self.bias, (self.eps, self.zero_centered))
        else:
            total = x if residual is None else x + residual
            normed = self._normed(total)
        return (normed, total) if return_sum else normed

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.bias is None:
            return F.rms_norm(x, (self.hidden_size,), weight, self.eps)
        return F.layer_norm(x, (self.hidden_size,), weight, self.bias, self.eps)
