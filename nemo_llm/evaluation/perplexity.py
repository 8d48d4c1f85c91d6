"""Perplexity and bits per byte of any text, in windows that overlap as little or as much as asked."""

import math
from dataclasses import dataclass

from nemo_llm.evaluation.scorer import Scorer


@dataclass(frozen=True)
class PerplexityResult:
    """Figures of one source. Bits per byte compare models of different tokenizers, perplexity per token does not."""

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float


def rolling_windows(tokens: list[int], prefix: int, window: int, context: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of context and continuation that score every token of a document once.

    Args:
        prefix: the token that stands before the document.
        window: longest input of the model.
        context: tokens of the window before that at least precede what is scored (1: disjoint windows, as lm-eval).
    """
    pairs = []
    step = window - context + 1
    done = 0
    while done < len(tokens):
        count = min(window if done == 0 else step, len(tokens) - done)
        end = done + count
        first = max(0, end - window)  # the input ends before the last token that is scored
        before = [prefix] if first == 0 else []
        whole = [*before, *tokens[max(0, first - 1 + len(before)) : end]]
        pairs.append((whole[: len(whole) - count], whole[len(whole) - count :]))
        done = end
    return pairs


def measure_perplexity(
    scorer: Scorer,
    name: str,
    documents: list[str],
    window: int | None = None,
    context: int = 1,
    prefix: int | None = None,
) -> PerplexityResult:
    """Score every token of every document.

    The first token is predicted from ``prefix``, else from the token that begins a text, else from the one that ends a
    document.
    """
    window = min(window or scorer.max_length, scorer.max_length)
    tokenizer = scorer.tokenizer
    if prefix is None:
        prefix = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    encoded = tokenizer.encode_batch(documents)
    pairs = [pair for tokens in encoded for pair in rolling_windows(tokens, prefix, window, context)]
    nats = -sum(log_likelihood for log_likelihood, _ in scorer.score(pairs))
    num_tokens = sum(map(len, encoded))
    num_bytes = sum(len(document.encode("utf-8")) for document in documents)
    loss = nats / max(num_tokens, 1)
    return PerplexityResult(
        name=name,
        num_documents=len(documents),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
    )
