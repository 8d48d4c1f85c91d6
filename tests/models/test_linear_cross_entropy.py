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

    from nemo_llm.models.layers.linear_cross_entropy import LinearCrossEntropy, LossRule

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


def _alive_at_once(tokens: int, chunk: int, softcap: float | None, with_gradients: bool) -> tuple[int, int]:
    """Chunks that were projected, and how many of their logits were in memory at the same time."""
    import weakref

    import torch
    import torch.distributed as dist

    from nemo_llm.models.layers import linear_cross_entropy as fused

    project, seen, most = fused.project, [], 0

    def counting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal most
        logits = project(x, weight)
        seen.append(weakref.ref(logits.untyped_storage()))
        most = max(most, sum(storage() is not None for storage in seen))
        return logits

    rule = fused.LossRule(59, 1e-3, softcap, chunk, False, dist.group.WORLD)
    hidden = torch.randn(tokens, 24, requires_grad=True)
    weight = torch.randn(64, 24, requires_grad=True)
    labels = torch.randint(0, 59, (tokens,))
    fused.project = counting
    try:
        with torch.set_grad_enabled(with_gradients):
            fused.LinearCrossEntropy.apply(hidden, weight, labels, torch.ones(tokens), rule)
    finally:
        fused.project = project
    return len(seen), most


@pytest.mark.parametrize("with_gradients", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_one_chunk_of_logits_is_alive(ranks: RankPool, softcap: float | None, with_gradients: bool) -> None:
    assert ranks.run(_alive_at_once, 1, 37, 8, softcap, with_gradients) == [(5, 1)]


def _raised_by(loss: str, z_coeff: float, softcap: float | None, evaluation: bool) -> str:
    """What the backward pass of a loss over the fused losses raises: the message, or nothing."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from nemo_llm.models.layers.linear_cross_entropy import LinearCrossEntropy, LossRule

    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(20, 24, generator=generator, requires_grad=True)
    weight = torch.randn(64, 24, generator=generator, requires_grad=True)
    labels = torch.randint(0, 59, (20,), generator=generator)
    mask = (torch.arange(20) % 4 > 0).float()
    rule = LossRule(59 - 64 * dist.get_rank(), z_coeff, softcap, 8, False, dist.group.WORLD)
    losses, hits = LinearCrossEntropy.apply(hidden, weight, labels, mask, rule)
    if evaluation:  # as a model that is not in training mode hands them out
        losses = torch.stack((losses, hits))[0]
    per_answer = (losses * mask).view(2, 10).sum(1)
    value = {
        "sum": lambda: (losses * mask).sum(),
        "sum of chosen losses": lambda: losses[mask > 0].sum(),
        "twice the sum": lambda: 2.0 * (losses * mask).sum(),
        "mean": lambda: (losses * mask).sum() / mask.sum(),
        "without the mask": lambda: losses.sum(),
        "mask and half of another": lambda: (losses * mask * torch.linspace(0.5, 1.0, 20)).sum(),
        "squares": lambda: (losses.square() * mask).sum(),
        "pair": lambda: -F.logsigmoid(0.1 * (per_answer[1] - per_answer[0])),
        "sum less itself": lambda: (losses * mask).sum() * 0.0,
    }[loss]()
    try:
        value.backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize(("z_coeff", "softcap", "world_size"), [(0.0, None, 1), (1e-2, None, 2), (0.0, 5.0, 1)])
def test_only_the_masked_sum_may_be_differentiated(
    ranks: RankPool, z_coeff: float, softcap: float | None, world_size: int, evaluation: bool
) -> None:
    for loss in ("sum", "sum of chosen losses"):
        assert ranks.run(_raised_by, world_size, loss, z_coeff, softcap, evaluation) == [""] * world_size
    others = ("twice the sum", "mean", "without the mask", "mask and half of another", "squares", "pair")
    for loss in (*others, "sum less itself"):
        for message in ranks.run(_raised_by, world_size, loss, z_coeff, softcap, evaluation):
            assert "performance.fused_linear_cross_entropy=false" in message, loss


def _pair_loss(fused: bool, tied: bool) -> str:
    """A pair loss over the losses of a model, as a preference task would write it: the backward pass's error."""
    import torch
    import torch.nn.functional as F

    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    cfg = compose(
        ["+model=gpt_tiny", "precision=fp32", "model.num_layers=1", f"model.share_embeddings_and_output_weights={tied}",
         f"performance.fused_linear_cross_entropy={fused}", "performance.gradient_accumulation_fusion=false"]
    )  # fmt: skip
    runtime = start_runtime(cfg.runtime_setting)
    try:
        (model,) = build_model_chunks(cfg.model_setting, runtime, 2048)
        model.train()
        tokens = torch.randint(0, 2000, (2, 17), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(2, 16)
        places = torch.arange(16).expand(2, 16)
        losses = model(tokens[:, :-1], places, attention_mask=None, labels=tokens[:, 1:], loss_mask=mask)
        chosen, rejected = (losses * mask).sum(1)
        (-F.logsigmoid(0.1 * (rejected - chosen))).backward()
    except RuntimeError as error:
        return str(error)
    finally:
        stop_runtime()
    return ""


@pytest.mark.parametrize("tied", [True, False])
def test_a_pair_loss_over_a_model_is_refused_or_right(ranks: RankPool, tied: bool) -> None:
    (refused,) = ranks.run(_pair_loss, 1, True, tied)
    assert "not the loss mask" in refused
    assert ranks.run(_pair_loss, 1, False, tied) == [""]
