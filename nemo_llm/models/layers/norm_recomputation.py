"""Norms that are recomputed in the backward pass, on machines without Transformer Engine."""

from megatron.core.tensor_parallel import random as megatron_random


def offer_norm_recomputation() -> None:
    """Let Megatron's layers recompute norms without Transformer Engine.

    megatron-core 0.16.1 makes the checkpoint of a norm with ``fp8=False``, which its constructor takes for FP8 (it asks
    ``fp8 is not None``); the forward pass then calls a function of Transformer Engine and ends in a NameError. The
    default becomes None, which means no FP8. tests/models/test_megatron_contract.py fails when this is not needed.
    """
    if not megatron_random.HAVE_TE:
        megatron_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
