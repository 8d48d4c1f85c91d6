"""A head that tells classes apart: cross-entropy at the last token of each text."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from nemo_llm.config.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean, head_problems

if TYPE_CHECKING:
    from nemo_llm.data.sample import Sample


class Classification(TokenMean):
    """Names of classes in ``model.head``, two or more."""

    source_kinds = frozenset({"labelled"})
    unit = "texts"

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The head has classes, and nothing asks for tokens."""
        needed = ("the names of the classes, two or more", "[first,second]")
        yield from head_problems(sections, len(sections.model.head or ()) > 1, needed)

    def compare(self, figures: Mapping[str, float], samples: "Iterable[Sample]", vocab_size: int) -> str:
        """Beside the entropy of the labels: the loss of whoever knows how frequent each class is and nothing else."""
        import numpy as np

        from nemo_llm.tasks.unigram import unigram_entropy_nats

        labels = [sample.labels[sample.loss_mask > 0] for sample in samples if sample.labels is not None]
        entropy = unigram_entropy_nats(np.unique(np.concatenate(labels), return_counts=True)[1])
        return f"loss {figures['loss']:.4f} nats; entropy of its labels {entropy:.4f} nats"
