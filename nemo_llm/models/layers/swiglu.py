"""SwiGLU (arXiv:2002.05202) as one kernel each way."""

from typing import Any

import torch
from megatron.core.transformer import mlp


def _swiglu(x: torch.Tensor, bias: torch.Tensor | None, *storage: Any) -> torch.Tensor:
    """``[..., 2f]`` and ``[2f]`` -> ``[..., f]``; ``storage``: Megatron's ways to keep the input, its own here too."""
    if any(storage) or not x.is_cuda:
        return _megatron_swiglu(x, bias, *storage)
    from nemo_llm.kernels.norm_swiglu import FusedSwiGLU

    return FusedSwiGLU.apply(x.flatten(0, -2), bias).view(*x.shape[:-1], -1)


_megatron_swiglu = mlp.bias_swiglu_impl


def offer_fused_swiglu() -> None:
    """Let Megatron's ``bias_activation_fusion`` use our kernel for SwiGLU.

    megatron-core 0.16.1 takes the function from this name of its module. tests/models/test_megatron_contract.py fails
    when it is gone.
    """
    mlp.bias_swiglu_impl = _swiglu
