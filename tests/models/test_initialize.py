"""Initial weights: a normal law, and the same numbers wherever an element lies."""

import torch

from nemo_llm.models.initialize import normal_at


def test_counters_give_a_standard_normal_law() -> None:
    values = normal_at(torch.arange(1 << 20), (1, 2, 3)).double()
    assert abs(values.mean()) < 5e-3
    assert abs(values.std() - 1) < 5e-3
    assert abs((values**4).mean() - 3) < 0.05  # kurtosis
    assert abs((values[1:] * values[:-1]).mean()) < 5e-3  # neighbours are not correlated


def test_an_element_depends_on_its_index_and_key_alone() -> None:
    index = torch.arange(1000)
    whole = normal_at(index, (7, 8, 9))
    assert torch.equal(normal_at(index[300:400], (7, 8, 9)), whole[300:400])
    assert not torch.equal(normal_at(index, (7, 8, 10)), whole)


def test_indices_beyond_32_bits_are_told_apart() -> None:
    index = torch.arange(1000)
    assert not torch.equal(normal_at(index, (7, 8, 9)), normal_at(index + (1 << 32), (7, 8, 9)))
