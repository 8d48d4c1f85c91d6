"""Next-token prediction on all tokens that the data counts."""

from collections.abc import Iterable, Iterator, Mapping

from numpy.typing import NDArray

from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean
from nemo_llm.tasks.unigram import beside_unigram, count_tokens, unigram_entropy_nats


class Pretrain(TokenMean):
    """Cross-entropy of the next token, at the end beside the entropy of the tokens by their frequencies alone."""

    source_kinds = frozenset({"indexed", "text", "chat", "mock"})
    accuracy = "next-token accuracy"

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The model has an output layer."""
        if sections.model.head is not None:
            rule = "predicts tokens, and the model has a head in place of its output layer"
            fix = "set task=classification (several names) or task=score (one), or model.head=null"
            yield Problem("task.name", sections.task.name, rule, fix)

    def compare(self, figures: Mapping[str, float], labels: Iterable[NDArray], vocab_size: int) -> str:
        """Beside the unigram entropy of the same tokens."""
        loss, entropy = figures["loss"], unigram_entropy_nats(count_tokens(labels, vocab_size))
        return f"loss {loss:.4f} nats; {beside_unigram(loss, entropy)}"
