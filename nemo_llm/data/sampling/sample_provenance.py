"""Which documents were in which step: recomputed from the configuration, since the order is a pure function of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_llm.data.sampling.blended_source import BlendedSource


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What one sample was made of."""

    sample: int
    """Number of the sample in the run."""
    source: str
    """Name of the source in the blend."""
    place: str
    """The dataset's prefix, or what stands for it."""
    first_document: int
    """Number of the first document that the sample's inputs touch."""
    last_document: int
    """Number of the last one (inclusive)."""


def ledger(source: BlendedSource, first_sample: int, last_sample: int) -> Iterator[LedgerEntry]:
    """Yield the origin of samples ``[first_sample, last_sample)`` of a training run."""
    for sample in range(first_sample, last_sample):
        number, local = source.locate(sample)
        dataset = source.sources[number]
        for first, last in dataset.documents_of(local):
            yield LedgerEntry(sample, dataset.name, dataset.place, first, last)
