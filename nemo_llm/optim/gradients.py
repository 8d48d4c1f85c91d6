"""Forgetting the gradients of the step before, without a pass over all of them.

The gradient of a linear layer's weight is a sum of our matrix products, straight in Megatron's fp32 buffer. Zeros are
not written there only for the first product to add to them: that one overwrites what is left of the step before
(`products.take_stale`). Everything else is zeroed.
"""

from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from nemo_llm.kernels.matmul import take_stale
from nemo_llm.models.language_model import LanguageModel
from nemo_llm.models.layers.experts import GroupedExperts
from nemo_llm.models.layers.fp8 import Fp8Linear
from nemo_llm.models.layers.linear import WholeLinear, weights_with_product


def mark_overwritten(chunk: DistributedDataParallel) -> None:
    """Mark the weights of this chunk whose gradients nothing writes but our products.

    Experts tell nobody that a weight's gradient is there where gradients are summed over ranks at the end alone.
    """
    for module in unwrap_model(chunk).modules():
        if isinstance(module, GroupedExperts):
            module.announces_gradients = chunk.ddp_config.overlap_grad_reduce
    for weight in _written_by_products(unwrap_model(chunk)):
        if hasattr(weight, "main_grad"):  # not frozen
            weight.overwrites_gradient = True


def zero_untouched(chunk: DistributedDataParallel) -> None:
    """Zero what is still stale after the last backward pass: weights that this step did not use."""
    for parameter in chunk.params_with_grad:
        if take_stale(parameter.main_grad):
            parameter.main_grad.zero_()


def _written_by_products(model: LanguageModel) -> Iterator[torch.nn.Parameter]:
    yield from weights_with_product(model, WholeLinear.product, Fp8Linear.product)
    for module in model.modules():
        if isinstance(module, GroupedExperts) and module.is_plain():
            yield from module.weights()
    # One that is the embedding too gets gradients from both.
    if model.fuses_loss and not model.share_embeddings_and_output_weights:
        yield model.output_weight
