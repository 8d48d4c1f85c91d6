"""What carries out this run's arithmetic, and why: said once at start, so that nothing is chosen in silence."""

from importlib.util import find_spec

import torch

from nemo_llm.config.checks.code_paths import fused_chunk_tokens, used_window, why_no_flex, why_not_grouped
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.megatron.models import accumulates_by_apex
from nemo_llm.models.layers.attention import prefers_cudnn
from nemo_llm.models.specs import choose_backend
from nemo_llm.models.warm_kernels import why_no_choice


def describe_choices(setting: ModelSetting, device: torch.device) -> list[str]:
    """One line each, for the log.

    Args:
        device: where the model runs.
    """
    backend, own = choose_backend(setting.model, device.type), setting.model.layer_spec
    lines = [_layers(setting, backend, device) if own is None else f"layers: model.layer_spec={own}"]
    if setting.model.moe is not None and backend == "torch" and own is None:
        why = why_not_grouped(setting)
        lines.append("experts: all in one product" if why is None else f"experts: one after another ({why})")
    if device.type != "cuda":
        return lines
    if backend == "torch" and own is None:
        lines += [_attention(setting, device), _matrices(setting, device)]
    return [*lines, _loss(setting), _gradients(setting)]


def _layers(setting: ModelSetting, backend: str, device: torch.device) -> str:
    impl, asked = setting.model.transformer_impl, f"model.transformer_impl={setting.model.transformer_impl}"
    name = "Transformer Engine's" if backend == "transformer_engine" else "the torch backend's"
    fp8 = "" if setting.precision.fp8 is None else f" with FP8 products ({setting.precision.fp8.fp8_recipe})"
    if impl != "auto":
        why = asked
    elif device.type != "cuda":
        why = f"{asked}, no CUDA device"
    elif find_spec("transformer_engine") is None:
        why = f"{asked}, Transformer Engine is not installed"
    elif backend == "torch":
        why = f"{asked}, Transformer Engine has not all parts of this model"
    else:
        why = f"{asked}, Transformer Engine is installed"
    return f"layers: {name}, {setting.precision.params_dtype}{fp8} ({why})"


def _attention(setting: ModelSetting, device: torch.device) -> str:
    model = setting.model
    plain = "cuDNN's kernels before FlashAttention's" if prefers_cudnn(device) else "PyTorch's choice of kernels"
    kinds = {
        "windows": used_window(model.window_size, setting.seq_length) is not None,
        "document masks": setting.reset_attention_mask,
        "capped scores": model.attn_logit_softcapping is not None,
    }
    special = " and ".join(kind for kind, wanted in kinds.items() if wanted)
    if not special:
        return f"attention: {plain}"
    why = why_no_flex(setting)
    how = "FlexAttention" if why is None else f"a matrix of all scores ({why})"
    return f"attention: {plain}; {special} by {how}"


def _matrices(setting: ModelSetting, device: torch.device) -> str:
    why = why_no_choice(setting, device)
    kernels = "the fastest of cuBLASLt's kernels with its bits" if why is None else f"no other tried ({why})"
    return f"matrix products: PyTorch's choice of kernel; {kernels}"


def _loss(setting: ModelSetting) -> str:
    if (tokens := fused_chunk_tokens(setting)) is not None:
        return f"loss: with the output projection, {tokens:,} tokens at a time"
    fused = setting.performance.fused_linear_cross_entropy
    reason = "fp16" if fused else "performance.fused_linear_cross_entropy=false"
    return f"loss: from whole logits ({reason})"


def _gradients(setting: ModelSetting) -> str:
    if not setting.performance.gradient_accumulation_fusion:
        return "weight gradients: added apart (performance.gradient_accumulation_fusion=false)"
    apex = "apex's kernel where Megatron's own layers are used" if accumulates_by_apex() else "apex is not installed"
    return f"weight gradients: added by the matrix products ({apex})"
