"""A head that tells classes apart: cross-entropy at the last token of each text."""

import sys
from collections.abc import Callable, Mapping

from nemo_llm.tasks.base import HeadMean


class Classification(HeadMean):
    """The classes are the names in ``model.head``."""

    names = (range(2, sys.maxsize), "the names of the classes, two or more", "[first,second]")

    def compare(self, figures: Mapping[str, float], entropy: Callable[[], float]) -> str:
        """Beside the loss of whoever knows how frequent each class is and nothing else."""
        return f"loss {figures['loss']:.4f} nats; entropy of its labels {entropy():.4f} nats"
