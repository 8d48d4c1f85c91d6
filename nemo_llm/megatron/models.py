"""Names in Megatron-Core's modules that take our kernels or mend a fault, and changes of a module's class.

Each function is declared in megatron/patches.toml: for which versions, why, and when it can go.
"""

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import attention, mlp, multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def become(module: torch.nn.Module, wanted: type) -> None:
    """Make ``module`` one of ``wanted``, a subclass of the class that Megatron gave it and lets nobody choose."""
    assert issubclass(wanted, type(module)), f"{wanted.__name__} is no {type(module).__name__}"
    module.__class__ = wanted


def mix_in(module: Any, mixin: type, word: str) -> None:
    """Put ``mixin`` before the class of ``module``; the name of that class then begins with ``word``."""
    become(module, _mixed(mixin, module.__class__, word))


@cache
def _mixed(mixin: type, base: type, word: str) -> type:
    return type(f"{word}{base.__name__}", (mixin, base), {})


def define_missing_names() -> None:
    """Set right the two names that are wrong without Transformer Engine; before a model is built."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def offer_norm_recomputation() -> None:
    """Let Megatron's layers recompute norms without Transformer Engine."""
    if not megatron_random.HAVE_TE:
        megatron_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def offer_gradient_accumulation(accumulate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
    """Let Megatron's linear layers add weight gradients by ``accumulate(inputs, output_grad, buffer)``.

    apex's kernel is kept where it is.
    """
    if layers._grad_accum_fusion_available:
        return
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    layers._grad_accum_fusion_available = True


def accumulates_by_apex() -> bool:
    """Whether apex's kernel is there, which Megatron's own linear layers then take."""
    return not isinstance(getattr(layers, "fused_weight_gradient_mlp_cuda", None), types.SimpleNamespace)


def offer_fused_rope(kernel: Callable[..., Any]) -> None:
    """Let Megatron's ``apply_rope_fusion`` use this kernel where Transformer Engine's is not installed."""
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = kernel


def offer_fused_qkv(kernel: Callable[..., Any]) -> None:
    """Let Megatron's ``fused_single_qkv_rope`` use this kernel, also where Transformer Engine's is installed."""
    attention.HAVE_FUSED_QKV_ROPE = True
    attention.apply_fused_qkv_rotary_pos_emb = kernel


def offer_fused_swiglu(kernel: Callable[..., Any]) -> None:
    """Let Megatron's ``bias_activation_fusion`` use this kernel for SwiGLU."""
    mlp.bias_swiglu_impl = kernel
