"""Merge adapters into the weights they stand beside, in fp32, and take them out again."""

from collections.abc import Callable

import torch

from nemo_llm.errors import InputError
from nemo_llm.peft.adapter import adapted_modules


@torch.no_grad()
def merge_adapters(chunks: list[torch.nn.Module]) -> Callable[[], None]:
    """Write into each adapted layer the weight that does the same alone; returns what undoes it, bit by bit.

    Raises:
        InputError: adapters that are no change of weights (bottlenecks, virtual tokens).
    """
    before = []
    for module in adapted_modules(chunks):
        merged = module.adapter.merge() if hasattr(module.adapter, "merge") else None
        if merged is None:
            kind = type(module.adapter).__name__
            raise InputError(f"a {kind} cannot be merged: it is no change of weights; keep it beside the model")
        weight, bias = merged
        before.append((module, module.weight.clone(), None if module.bias is None else module.bias.clone()))
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
        module.adapter_active = False

    @torch.no_grad()
    def unmerge() -> None:
        for module, weight, bias in before:
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
            module.adapter_active = True

    return unmerge
