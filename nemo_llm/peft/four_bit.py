"""Frozen weights in 4 bits (QLoRA, arXiv:2305.14314): NF4 in blocks of 64, whose scales are themselves 8-bit numbers.

bitsandbytes quantises and multiplies. A layer changes its class in place and keeps its name; its weight is computed
anew from the 4 bits wherever it is asked for, also for the gradient of the inputs, and never kept.
"""

import importlib.util
from typing import Any

import torch
from megatron.core.utils import get_model_config, unwrap_model

from nemo_llm.errors import ConfigError, Problem
from nemo_llm.megatron.models import mix_in
from nemo_llm.peft.linear import find_linears

BLOCK_SIZE = 64


class _FourBitLinear:
    """Mixed into a Megatron linear layer of one rank; ``packed`` holds the weight, two elements a byte."""

    packed: torch.Tensor
    quant_state: Any
    bias: torch.Tensor | None
    skip_bias_add: bool

    @property
    def weight(self) -> torch.Tensor:
        """``[out, in]`` in the type that it had."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.quant_state)

    def forward(self, input_: torch.Tensor, *_arguments: Any, **_settings: Any) -> tuple[torch.Tensor, Any]:
        from bitsandbytes import matmul_4bit

        added = None if self.skip_bias_add else self.bias
        out = matmul_4bit(input_, self.packed.t(), quant_state=self.quant_state, bias=added)
        return out, self.bias if self.skip_bias_add else None


def quantize_base(chunks: list[torch.nn.Module], pg_collection: Any) -> None:
    """Quantise every linear layer inside the transformer layers; embeddings, norms and the output layer stay.

    Comes before adapters are put on: they see a layer of 4 bits as any other.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        rule = "needs bitsandbytes, which is not installed"
        fix = "pip install 'nemo_llm[qlora]', or set it to null"
        raise ConfigError([Problem("peft.base_weights", "nf4", rule, fix)])
    for chunk in chunks:
        whole = unwrap_model(chunk)
        for place in find_linears(whole, get_model_config(whole), pg_collection):
            _quantize(place.linear)


@torch.no_grad()
def _quantize(linear: Any) -> None:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        linear.weight.detach(), blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )
    del linear.weight
    mix_in(linear, _FourBitLinear, "FourBit")
    linear.register_buffer("packed", packed, persistent=False)
    linear.quant_state = state
