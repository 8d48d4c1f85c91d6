"""Next-token prediction on all tokens that the data counts."""

from collections.abc import Callable, Iterator, Mapping

from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean


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

    def compare(self, figures: Mapping[str, float], entropy: Callable[[], float]) -> str:
        """Beside what a model reaches that knows how frequent each token is and nothing else."""
        loss, unigram = figures["loss"], entropy()
        better = unigram - loss
        how = (
            f"better by {better:.4f}" if better >= 0 else f"worse by {-better:.4f}: it has not learned these tokens yet"
        )
        words = f"unigram entropy of the same tokens {unigram:.4f} nats; the model is {how}"
        return f"loss {loss:.4f} nats; {words}"
