"""Rotary wavelengths stretched for longer contexts, as their authors and Hugging Face's models define it.

Megatron-Core has Llama 3's way with fixed constants; here every number comes from ``model.rope_scaling``.
"""

import math
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from nemo_llm.config.sections.model import ModelConfig, RopeScaling

_YARN_BETA_FAST, _YARN_BETA_SLOW = 32.0, 1.0


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with the frequencies of ``model.rope_scaling``.

    Args:
        model: our model section, which has a scaling.
        cp_group: context-parallel ranks.
    """

    def __init__(self, model: ModelConfig, cp_group: Any) -> None:
        super().__init__(model.head_dim, model.rotary_percent, cp_group=cp_group)
        assert model.rope_scaling is not None
        self.scaling, self.base = model.rope_scaling, model.rotary_base
        self.channels = int(model.head_dim * model.rotary_percent)
        self.inv_freq: torch.Tensor = self._frequencies(self.base)
        if self.scaling.type != "dynamic":
            self.inv_freq = scale_frequencies(self.inv_freq, self.scaling, self.base)

    def _frequencies(self, base: float) -> torch.Tensor:
        exponents = torch.arange(0, self.channels, 2, dtype=torch.float32, device=torch.cuda.current_device())
        return 1.0 / base ** (exponents / self.channels)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles [max_seq_len, channels / 2]; ``dynamic`` (NTK-aware) raises the base with the length."""
        frequencies = self.inv_freq
        trained = self.scaling.original_max_position_embeddings
        length = max_seq_len + offset
        if self.scaling.type == "dynamic" and trained is not None and length > trained:
            grown = self.scaling.factor * length / trained - (self.scaling.factor - 1.0)
            frequencies = self._frequencies(self.base * grown ** (self.channels / (self.channels - 2)))
        positions = torch.arange(max_seq_len, device=frequencies.device, dtype=frequencies.dtype) + offset
        return torch.outer(positions, frequencies)


class LocalRotaryEmbedding(RotaryEmbedding):
    """Two sets of angles side by side in the last dimension: of layers that see everything, of those with a window.

    Args:
        model: our model section, which has a ``rotary_local_base``.
        cp_group: context-parallel ranks.
    """

    def __init__(self, model: ModelConfig, cp_group: Any) -> None:
        settings = {"kv_channels": model.head_dim, "rotary_percent": model.rotary_percent, "cp_group": cp_group}
        super().__init__(rotary_base=model.rotary_local_base, **settings)
        scaled = model.rope_scaling is not None
        plain = partial(RotaryEmbedding, rotary_base=model.rotary_base, **settings)
        self.far: RotaryEmbedding = ScaledRotaryEmbedding(model, cp_group) if scaled else plain()

    def forward(self, *inputs: Any, **settings: Any) -> torch.Tensor:
        """[s/cp, 1, 1, 2r]"""
        return torch.cat((self.far(*inputs, **settings), super().forward(*inputs, **settings)), -1)


def scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Frequencies [channels / 2] of types that do not depend on the length."""
    if scaling.type == "linear":  # arXiv:2306.15595
        return frequencies / scaling.factor
    if scaling.type == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, scaling, base)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between interpolated (Llama 3.1, Meta)."""
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    turns = (scaling.original_max_position_embeddings or 0) * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn(frequencies: torch.Tensor, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Interpolation by number of rotations over the trained length (YaRN, arXiv:2309.00071)."""
    channels, trained = 2 * frequencies.numel(), scaling.original_max_position_embeddings or 0

    def channel_of(rotations: float) -> float:
        return channels * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel_of(scaling.beta_fast or _YARN_BETA_FAST)), 0)
    high = min(math.ceil(channel_of(scaling.beta_slow or _YARN_BETA_SLOW)), channels - 1)
    steps = torch.arange(channels // 2, dtype=torch.float32, device=frequencies.device)
    stretched = ((steps - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies queries and keys with; 1 for other types."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
