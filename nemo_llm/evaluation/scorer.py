"""What evaluation needs of a model; `nemo_llm.inference.scoring.ModelScorer` is one. Entry points join the two."""

from collections.abc import Sequence
from typing import Protocol

from nemo_llm.tokenizers.tokenizer import Tokenizer

Score = tuple[float, bool]
"""Log-likelihood (nats) of a continuation, and whether greedy decoding would give it."""


class Scorer(Protocol):
    """A model with its tokenizer. On several ranks every method is a collective with the same result on each."""

    tokenizer: Tokenizer
    max_length: int
    classes: tuple[str, ...]
    """Of a head in place of the output layer; empty for a language model."""

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Score pairs of context and continuation ids; too long ones lose tokens at the context's left."""
        ...

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """The likeliest continuations, each ended before any of ``stop``; too long prompts lose tokens at the left."""
        ...

    def classify(self, inputs: Sequence[list[int]]) -> list[list[float]]:
        """Logits of the head's classes after each input; too long ones lose tokens at the right."""
        ...
