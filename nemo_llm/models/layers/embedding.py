"""Megatron's word embedding, whose gradient goes straight into the fp32 gradient buffer."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

from nemo_llm.models.layers.main_grad import gradient_buffer, returned_gradient


class Embedding(VocabParallelEmbedding):
    """As Megatron's; each rank looks up the tokens of its part of the vocabulary, and the ranks add up."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, h]; [s/tp, b, h] where Megatron wants it scattered for sequence parallelism."""
        tokens, split = input_, self.tp_group.size() > 1
        if split:
            outside = (tokens < self.vocab_start_index) | (tokens >= self.vocab_end_index)
            tokens = torch.where(outside, -1, tokens - self.vocab_start_index)
        output = _LookUp.apply(tokens, self.weight, split)
        if self.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


class _LookUp(torch.autograd.Function):
    """``weight[tokens]``; zeros for negative tokens, if there may be any."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, some_negative: bool) -> torch.Tensor:
        """``tokens`` [b, s], ``weight`` [v/tp, h] -> [b, s, h]."""
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        if not some_negative:
            return F.embedding(tokens, weight)
        return F.embedding(tokens.clamp(min=0), weight).masked_fill_((tokens < 0)[..., None], 0.0)

    @staticmethod
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        """The weight's gradient is added to ``main_grad`` where there is one, and announced."""
        (tokens,) = ctx.saved_tensors
        weight: torch.Tensor = ctx.weight
        buffer = gradient_buffer(weight)
        _add_rows(buffer, tokens.flatten(), output_grad.flatten(0, -2))
        return None, returned_gradient(weight, buffer), None


def _add_rows(buffer: torch.Tensor, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
    """``buffer[tokens] += gradient``: ``[v/tp, h]``, ``[T]`` and ``[T, h]``; negative tokens are left out."""
    if buffer.is_cuda:
        from nemo_llm.kernels.embedding_gradient import add_rows

        add_rows(buffer, tokens, gradient)
        return
    here = tokens >= 0
    buffer.index_add_(0, tokens[here], gradient[here].to(buffer.dtype))
