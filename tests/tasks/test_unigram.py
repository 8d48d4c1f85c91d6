"""Unigram entropy against known values and against the loss of a fitted fixed prediction."""

import math

import numpy as np
import pytest

from nemo_llm.config.sections.task import TokenTask
from nemo_llm.errors import InputError
from nemo_llm.tasks import build_task
from nemo_llm.training.lifecycle import count_tokens, unigram_entropy_nats


def test_known_values():
    assert unigram_entropy_nats([5, 5, 5, 5]) == pytest.approx(math.log(4))
    assert unigram_entropy_nats([9, 0]) == 0.0
    assert unigram_entropy_nats([3, 1]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_no_fixed_prediction_has_a_lower_loss():
    generator = np.random.default_rng(0)
    tokens = generator.zipf(1.5, 10_000) % 50
    entropy = unigram_entropy_nats(count_tokens([tokens], 50))
    own = np.bincount(tokens, minlength=50) / tokens.size
    assert -np.log(own[tokens]).mean() == pytest.approx(entropy)
    for noise in (0.01, 0.1, 1.0):
        other = own + noise * generator.random(50)
        assert -np.log((other / other.sum())[tokens]).mean() > entropy


def test_counts_do_not_depend_on_chunks_shapes_or_kinds():
    tokens = np.arange(60) % 7
    chunks = [tokens[:20].astype(np.uint16).reshape(4, 5), [], tokens[20:].astype(np.uint64)]
    assert count_tokens(chunks, 10).tolist() == count_tokens([tokens], 10).tolist() == [9] * 4 + [8] * 3 + [0] * 3


@pytest.mark.parametrize(("tokens", "shown"), [([1, 10], "token 10"), ([-1, 3], "token -1")])
def test_token_outside_of_the_vocabulary_is_named(tokens, shown):
    with pytest.raises(InputError, match=f"{shown} lies outside of the vocabulary of 10"):
        count_tokens([tokens], 10)


def test_no_tokens():
    with pytest.raises(InputError, match="no validation tokens"):
        unigram_entropy_nats(count_tokens([[]], 10))


def test_a_model_that_is_worse_is_said_to_be_worse():
    task = build_task(TokenTask(name="pretrain", z_loss_coeff=0.0))
    assert task.compare({"loss": 2.0}, lambda: 3.5).endswith("the model is better by 1.5000")
    assert "the model is worse by 3.0792" in task.compare({"loss": 8.0792}, lambda: 5.0)
