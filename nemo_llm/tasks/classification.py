"""A head that tells classes apart: cross-entropy at the last token of each text."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean, head_problems
from nemo_llm.tasks.unigram import unigram_entropy_nats


class Classification(TokenMean):
    """The classes are named in ``model.head``."""

    source_kinds = frozenset({"labelled"})
    unit = "texts"

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The head has classes, and nothing asks for tokens."""
        needed = ("the names of the classes, two or more", "[first,second]")
        yield from head_problems(sections, len(sections.model.head or ()) > 1, needed)

    def compare(self, figures: Mapping[str, float], labels: Iterable[NDArray], vocab_size: int) -> str:
        """Beside the entropy of the labels: the loss of whoever knows how frequent each class is and nothing else."""
        entropy = unigram_entropy_nats(np.unique(np.concatenate(list(labels)), return_counts=True)[1])
        return f"loss {figures['loss']:.4f} nats; entropy of its labels {entropy:.4f} nats"
