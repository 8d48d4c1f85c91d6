"""Next-token prediction on all tokens that the data counts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from nemo_llm.config.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean

if TYPE_CHECKING:
    from nemo_llm.data.sample import Sample


class Pretrain(TokenMean):
    """Cross-entropy of the next token, beside the unigram entropy at the end."""

    source_kinds = frozenset({"indexed", "text", "chat", "mock"})
    accuracy = "next-token accuracy"

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The model has an output layer."""
        if sections.model.head is not None:
            rule = "predicts tokens, and the model has a head in place of its output layer"
            fix = "set task=classification (several names) or task=score (one), or model.head=null"
            yield Problem("task.name", sections.task.name, rule, fix)

    def compare(self, figures: Mapping[str, float], samples: "Iterable[Sample]", vocab_size: int) -> str:
        """Beside the entropy of the same tokens by their frequencies alone."""
        from nemo_llm.tasks.unigram import beside_unigram, count_tokens, unigram_entropy_nats

        counts = count_tokens((sample.tokens[1:][sample.loss_mask > 0] for sample in samples), vocab_size)
        return f"loss {figures['loss']:.4f} nats; {beside_unigram(figures['loss'], unigram_entropy_nats(counts))}"
