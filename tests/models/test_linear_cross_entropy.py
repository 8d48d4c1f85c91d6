"""The fused projection and loss against PyTorch's own, in float64 where it matters: values, gradients, odd shapes."""

import pytest

from tests.ranks import RankPool


def _compare(
    tokens: int, vocabulary: int, known: int, chunk: int, z_coeff: float, softcap: float | None
) -> list[float]:
    """Relative errors of losses, hidden gradient and weight gradient; the vocabulary is split over the ranks."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from nemo_llm.models.linear_cross_entropy import LinearCrossEntropy, LossRule

    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, 24, generator=generator)
    weight = torch.randn(vocabulary, 24, generator=generator)
    labels = torch.randint(0, known, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.2).float()

    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits[:, :known]
    wanted = F.cross_entropy(logits, labels, reduction="none") + z_coeff * logits.logsumexp(-1).square()
    (wanted * mask).sum().backward()

    columns = vocabulary // world
    local = weight[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    mine = hidden.clone().requires_grad_()
    rule = LossRule(known - rank * columns, z_coeff, softcap, chunk, False, dist.group.WORLD)
    losses, hits = LinearCrossEntropy.apply(mine, local, labels, mask, rule)
    (losses * mask).sum().backward()
    dist.all_reduce(mine.grad)  # each rank has the share of its part of the vocabulary

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual.double() - expected).norm() / expected.norm())

    assert torch.equal(hits.bool(), logits.argmax(-1) == labels)
    w_part = w.grad[rank * columns : (rank + 1) * columns]
    return [error(losses, wanted.detach()), error(mine.grad, h.grad), error(local.grad, w_part)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("z_coeff", "softcap"), [(0.0, None), (1e-2, None), (0.0, 5.0)])
@pytest.mark.parametrize(("tokens", "chunk"), [(37, 8), (16, 64), (1, 1)])
def test_equals_pytorch(
    ranks: RankPool, world_size: int, z_coeff: float, softcap: float | None, tokens: int, chunk: int
) -> None:
    for errors in ranks.run(_compare, world_size, tokens, 64, 59, chunk, z_coeff, softcap):
        assert max(errors) < 2e-6
