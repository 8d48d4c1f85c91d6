"""A head that gives each text a number: squared error at the last token of each text."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from nemo_llm.config.run import RunConfig
from nemo_llm.errors import Problem
from nemo_llm.tasks.base import TokenMean, head_problems

if TYPE_CHECKING:
    from nemo_llm.data.sample import Sample


class Score(TokenMean):
    """One name in ``model.head``."""

    source_kinds = frozenset({"labelled"})
    unit, accuracy = "texts", None

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """The head has one output, and nothing asks for tokens."""
        yield from head_problems(sections, len(sections.model.head or ()) == 1, ("one name", "[score]"))

    def compare(self, figures: Mapping[str, float], samples: "Iterable[Sample]", vocab_size: int) -> str:
        """The error alone."""
        return f"mean squared error {figures['loss']:.4f}"
