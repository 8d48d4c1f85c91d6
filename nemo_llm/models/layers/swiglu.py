"""SwiGLU (arXiv:2002.05202) as one kernel each way."""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl


def swiglu(x: torch.Tensor, bias: torch.Tensor | None, *storage: Any) -> torch.Tensor:
    """``[..., 2f]`` and ``[2f]`` -> ``[..., f]``; ``storage``: Megatron's ways to keep the input, its own here too."""
    if any(storage) or not x.is_cuda:
        return bias_swiglu_impl(x, bias, *storage)
    from nemo_llm.kernels.norm_swiglu import FusedSwiGLU

    return FusedSwiGLU.apply(x.flatten(0, -2), bias).view(*x.shape[:-1], -1)
