"""A head that gives each text a number: squared error at the last token of each text."""

from collections.abc import Iterable, Iterator, Mapping

from numpy.typing import NDArray

from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean, head_problems


class Score(TokenMean):
    """The score is the one name in ``model.head``."""

    source_kinds = frozenset({"labelled"})
    unit, accuracy = "texts", None

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The head has one output, and nothing asks for tokens."""
        yield from head_problems(sections, len(sections.model.head or ()) == 1, ("one name", "[score]"))

    def compare(self, figures: Mapping[str, float], labels: Iterable[NDArray], vocab_size: int) -> str:
        """The error alone."""
        return f"mean squared error {figures['loss']:.4f}"
