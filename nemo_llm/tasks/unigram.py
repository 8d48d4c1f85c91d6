"""Unigram entropy of a token set: what a model reaches that knows how frequent each token is and nothing else.

A model has learned to use context once its validation loss lies below it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_llm.errors import InputError


def count_tokens(chunks: Iterable[ArrayLike], vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs, as ``[vocab_size]``. Counts of several sets or ranks may be added.

    Args:
        chunks: integer arrays of any shape: the targets that the loss is taken over, and no others.
        vocab_size: of the tokenizer.

    Raises:
        InputError: a token that is negative or not below `vocab_size`.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in chunks:
        tokens = np.asarray(chunk).ravel()
        if tokens.size == 0:
            continue
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"token {low if low < 0 else high} lies outside of the vocabulary of {vocab_size}\n"
                "      fix: prepare the data with the tokenizer of this run, or set model.vocab_size to its size"
            )
        # int64: bincount refuses uint64, and token files hold unsigned kinds.
        counts += np.bincount(tokens.astype(np.int64), minlength=vocab_size)
    return counts


def unigram_entropy_nats(counts: ArrayLike) -> float:
    """Entropy in nats per token of the distribution that `counts` give: the lowest loss of a fixed prediction.

    Raises:
        InputError: there are no tokens.
    """
    present = np.asarray(counts, dtype=np.float64)
    present = present[present > 0]
    if present.size == 0:
        raise InputError("no validation tokens to take the unigram entropy of\n      fix: check data.validation")
    share = present / present.sum()
    return max(0.0, float(-(share * np.log(share)).sum()))  # a single token gives -0.0


def beside_unigram(loss: float, entropy: float) -> str:
    """How a loss compares with the entropy of the same tokens by their frequencies alone, both in nats."""
    better = entropy - loss
    how = f"better by {better:.4f}" if better >= 0 else f"worse by {-better:.4f}: it has not learned these tokens yet"
    return f"unigram entropy of the same tokens {entropy:.4f} nats; the model is {how}"
