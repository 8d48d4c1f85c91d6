"""Which documents of a source are for training and which for validation (``data.split``).

A source is cut between documents, in file order. Where that would leave a set without one whole sample, as for a text
of one file or of six, it is cut between tokens instead, inside documents. Which of the two follows from the data and
the configuration alone, so every start of a run cuts in the same place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_llm.config.sections.data import parse_split
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.errors import InputError
from nemo_llm.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SourcePart:
    """What a set reads of each of its sources."""

    name: str
    """``training`` or ``validation``, as ``data.split`` makes them; else the key of the set."""
    low: float
    high: float
    """From this share of a source to that one."""
    split: str | None = None
    """The value of ``data.split``; None for a set that reads its sources whole."""


def split_parts(split: str | None) -> list[SourcePart]:
    """The parts that a value of ``data.split`` makes: one for training, and one for validation if that has a share."""
    if split is None:
        return [SourcePart("training", 0.0, 1.0)]
    train, validation = parse_split(split)
    parts = [SourcePart("training", 0.0, train, split), SourcePart("validation", train, train + validation, split)]
    return parts if validation > 0 else parts[:1]


class TokenRange(TokenStore):
    """The tokens ``[first, last)`` of a store.

    Positions and documents keep their numbers: the documents at both ends are cut, and those outside are empty.
    """

    def __init__(self, store: TokenStore, first: int, last: int) -> None:
        self.store, self.first, self.last = store, first, last
        self.prefix = store.prefix
        self.num_documents, self.num_tokens = store.num_documents, last - first

    @property
    def identity(self) -> object:
        """The whole store's, and the range."""
        return [self.store.identity, self.first, self.last]

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` as int64 [count]."""
        return self.store.read(start, count)

    def document_start(self, document: int) -> int:
        """Return the position of a document's first token within the range."""
        return min(max(self.store.document_start(document), self.first), self.last)

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at a position."""
        return self.store.document_at(token)


def cut_documents(
    source: str, store: TokenStore, part: SourcePart, documents: str, why: str = ""
) -> tuple[TokenStore, tuple[int, int]]:
    """The documents of a set, none of which is cut.

    Args:
        source: the source's name, for messages.
        documents: what they are called, such as ``conversations``.
        why: how the source is split, as the end of a sentence.

    Raises:
        InputError: there are none; names source, set and the key to change.
    """
    found = _documents(store, part)
    if found[0] < found[1]:
        return store, found
    if part.split is None:
        raise InputError(f"{_where(source, part)} holds no {documents}; give it some")
    split = _fitting_split(split_parts(part.split), lambda one: _documents(store, one), 1)
    raise InputError(
        f"source {source}: data.split={part.split} leaves none of its {store.num_documents:,} {documents} for "
        f"{part.name}{why}; {_ways_out(split, part, documents)}"
    )


def cut_text(
    source: str, store: TokenStore, part: SourcePart, tokens_per_sample: int
) -> tuple[TokenStore, tuple[int, int]]:
    """The documents of a set, or where a set would get less than a sample, tokens of the store.

    Args:
        source: the source's name, for messages.
        tokens_per_sample: that the smallest sample needs; 1 where samples are padded.

    Raises:
        InputError: there is less than one sample; names source, set and the key to change.
    """
    parts = split_parts(part.split) if part.split is not None else [part]
    if all(_tokens(store, _documents(store, one)) >= tokens_per_sample for one in parts):
        return store, _documents(store, part)
    ranges = [_token_range(store, one) for one in parts]
    sizes = [last - first for first, last in ranges]
    if min(sizes) < tokens_per_sample:
        raise InputError(_too_few_tokens(source, store, parts, tokens_per_sample))
    if part.name == "training":
        shown = ", ".join(f"{size:,} for {one.name}" for size, one in zip(sizes, parts, strict=True))
        _log.info(
            "source %s: data.split=%s cuts it inside its documents, by tokens (%s), since cut between its %d documents "
            "it would leave a set without a whole sample",
            source,
            part.split,
            shown,
            store.num_documents,
        )
    first, last = ranges[parts.index(part)]
    return TokenRange(store, first, last), (store.document_at(first), store.document_at(last - 1) + 1)


def _documents(store: TokenStore, part: SourcePart) -> tuple[int, int]:
    return store.first_document(part.low), store.first_document(part.high)


def _tokens(store: TokenStore, documents: tuple[int, int]) -> int:
    return store.document_start(documents[1]) - store.document_start(documents[0])


def _token_range(store: TokenStore, part: SourcePart) -> tuple[int, int]:
    total = store.document_start(store.num_documents)
    return round(part.low * total), round(part.high * total)


def _too_few_tokens(source: str, store: TokenStore, parts: Sequence[SourcePart], needed: int) -> str:
    total = store.document_start(store.num_documents)
    sizes = [last - first for first, last in (_token_range(store, part) for part in parts)]
    size, part = min(zip(sizes, parts, strict=True), key=lambda pair: pair[0])
    key = "" if needed == 1 else " (data.seq_length + 1)"
    one_sample = f"one sample needs {needed:,}{key}"
    if part.split is None:
        shorter = "" if needed == 1 else " or set a shorter data.seq_length"
        return f"{_where(source, part)} holds {size:,} tokens, but {one_sample}; give it more text{shorter}"
    found = _fitting_split(parts, lambda one: _token_range(store, one), needed)
    return (
        f"source {source}: data.split={part.split} leaves {size:,} of its {total:,} tokens for {part.name}, but "
        f"{one_sample}; {_ways_out(found, part, 'text')}"
    )


def _where(source: str, part: SourcePart) -> str:
    return f"source {source}" if part.name == "training" else f"{part.name}: source {source}"


def _ways_out(found: str | None, part: SourcePart, kind: str) -> str:
    ways = [f"set data.split={found}"] if found is not None else []
    ways.append(f"give it more {kind}")
    if part.name == "validation":
        ways.append("train without it by data.split=null, or name a set of its own under data.validation")
    return ", ".join(ways)


def _fitting_split(
    parts: Sequence[SourcePart], bounds: Callable[[SourcePart], tuple[int, int]], needed: int
) -> str | None:
    """The split in whole percents, nearest to the one given, that gives each part what it needs; None if none does."""
    given = 100 * parts[0].high
    for train in sorted(range(1, 100), key=lambda percent: abs(percent - given)):
        split = f"{train},{100 - train}"
        if all(last - first >= needed for first, last in map(bounds, split_parts(split))):
            return split
    return None
