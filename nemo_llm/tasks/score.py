"""A head that gives each text a number: squared error at the last token of each text."""

from collections.abc import Callable, Mapping

from nemo_llm.tasks.base import HeadMean


class Score(HeadMean):
    """The score is the one name in ``model.head``."""

    accuracy = None
    names = (range(1, 2), "one name", "[score]")

    def compare(self, figures: Mapping[str, float], _entropy: Callable[[], float]) -> str:
        """The error alone."""
        return f"mean squared error {figures['loss']:.4f}"
