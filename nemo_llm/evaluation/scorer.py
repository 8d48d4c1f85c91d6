"""What evaluation needs of a model; `nemo_llm.inference.scoring.ModelScorer` is one. Entry points join the two."""

from collections.abc import Sequence
from typing import Protocol

from nemo_llm.data.tokenizer import Tokenizer

Score = tuple[float, bool]
"""Log-likelihood (nats) of a continuation, and whether greedy decoding would give it."""


class Scorer(Protocol):
    """A model with its tokenizer. On several ranks every method is a collective with the same result on each."""

    tokenizer: Tokenizer
    max_length: int

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Score pairs of context and continuation ids; too long ones lose tokens at the context's left."""
        ...

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """The likeliest continuations, each ended before any of ``stop``; too long prompts lose tokens at the left."""
        ...
