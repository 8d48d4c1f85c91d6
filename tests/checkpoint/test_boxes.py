"""Ranges of flattened tensors as boxes, against NumPy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemo_llm.checkpoint.optimizer_state import boxes_of_range


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_hold_the_range_in_its_order(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = np.arange(size).reshape(shape)
    found = [
        whole[tuple(slice(at, at + length) for at, length in zip(offset, lengths, strict=True))].ravel()
        for offset, lengths in boxes_of_range(tuple(shape), start, stop)
    ]
    assert len(found) <= 2 * len(shape) - 1
    assert np.concatenate([*found, np.empty(0, int)]).tolist() == list(range(start, stop))
