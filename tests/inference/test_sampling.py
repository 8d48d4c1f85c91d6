"""Cut-offs against transformers' own, the distribution that is drawn from, and independence of the batch."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nemo_llm.config.commands.data import compose_tool
from nemo_llm.config.commands.generate import GenerateConfig, SamplingConfig
from nemo_llm.inference.sampling import Sampler, cut_off

CPU = torch.device("cpu")


def sampling(*overrides: str) -> SamplingConfig:
    prefixed = [f"sampling.{text}" for text in overrides]
    return compose_tool("generate", GenerateConfig, ["checkpoint=none", "text=none", *prefixed]).sampling


def logits(rows: int = 64, columns: int = 50) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    ("overrides", "warper"),
    [
        (["top_k=7"], TopKLogitsWarper(7)),
        (["top_p=0.8"], TopPLogitsWarper(0.8)),
        (["top_p=0.05"], TopPLogitsWarper(0.05)),
        (["min_p=0.1"], MinPLogitsWarper(0.1)),
    ],
)
def test_cut_offs_keep_what_transformers_keeps(overrides: list[str], warper: object) -> None:
    kept = cut_off(logits(), sampling(*overrides)) > 0
    expected = warper(None, logits()) > -torch.inf
    assert torch.equal(kept, expected)
    assert kept.sum() < kept.numel()


def test_repetition_penalty_equals_transformers() -> None:
    prompts = [[1, 2, 2, 9], [5]]
    sampler = Sampler(sampling("repetition_penalty=1.7"), [0, 1], prompts, CPU)
    scores = logits(2)
    first = sampler(scores, 0)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = [processor(torch.tensor([p]), scores[i : i + 1].clone()).argmax() for i, p in enumerate(prompts)]
    assert first.tolist() == [int(token) for token in expected]
    seen = [[*prompt, int(token)] for prompt, token in zip(prompts, first, strict=True)]
    expected = [processor(torch.tensor([p]), scores[i : i + 1].clone()).argmax() for i, p in enumerate(seen)]
    assert sampler(scores, 1).tolist() == [int(token) for token in expected]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    scores = logits(1, 12)
    count = 4000
    settings = sampling(f"max_new_tokens={count}", "temperature=1.5", "top_k=6")
    sampler = Sampler(settings, [3], [[0]], CPU)
    drawn = torch.tensor([int(sampler(scores, step)) for step in range(count)])
    shares = torch.bincount(drawn, minlength=12).double() / count
    expected = cut_off(scores / 1.5, settings)[0].double()
    expected /= expected.sum()
    assert (shares - expected).abs().max() < 4 * 0.5 / count**0.5
    assert shares[expected == 0].sum() == 0


def test_a_row_draws_the_same_in_any_batch() -> None:
    settings = sampling("temperature=1.0")
    scores = logits(4)
    together = Sampler(settings, [0, 1, 2, 3], [[0]] * 4, CPU)(scores, 5)
    alone = [int(Sampler(settings, [row], [[0]], CPU)(scores[row : row + 1], 5)) for row in range(4)]
    assert together.tolist() == alone
    other_seed = Sampler(sampling("temperature=1.0", "seed=5"), [0, 1, 2, 3], [[0]] * 4, CPU)
    assert any(other_seed(scores, step).tolist() != together.tolist() for step in range(3))
