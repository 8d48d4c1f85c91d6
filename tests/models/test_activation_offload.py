"""Layers whose activations are offloaded train as they do without: the same bits, whatever keeps what autograd saves.

On a CPU nothing is copied, but the hooks for saved tensors run as they do beside a GPU.
"""

import pytest

from tests.parity.layouts import train_losses
from tests.ranks import RankPool

OVERLAP = ("parallelism.use_distributed_optimizer=true", "parallelism.overlap_grad_reduce=true")
TP2 = ("parallelism.tensor_model_parallel_size=2", "parallelism.sequence_parallel=true")


@pytest.mark.parametrize(
    ("model", "processes", "overrides"),
    [
        ("gpt_tiny", 1, ("precision=bf16",)),
        ("moe_tiny", 1, ("precision=bf16",)),
        ("gpt_tiny", 2, TP2),
        ("gpt_tiny", 2, OVERLAP),
        (
            "moe_tiny",
            2,
            (*TP2, "parallelism.expert_model_parallel_size=2", "parallelism.expert_tensor_parallel_size=1"),
        ),
    ],
    ids=["dense", "experts", "TP2", "overlap", "TP2 EP2"],
)
def test_offloaded_layers_train_as_others(
    model: str, processes: int, overrides: tuple[str, ...], ranks: RankPool
) -> None:
    offload = ("performance.offload_activation_layers=1",)
    plain = ranks.run(train_losses, processes, model, overrides, (), 4)
    assert ranks.run(train_losses, processes, model, overrides, offload, 4) == plain
