"""Where tokens come from: the interface of an indexed dataset, and a mock of it."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_llm.data.sampling.keyed_permutation import derive_key, mix64


class TokenStore(Protocol):
    """Documents of tokens one after the other: an indexed dataset or a mock."""

    prefix: str
    num_tokens: int
    num_documents: int

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` as int64 [count]."""
        ...

    def document_start(self, document: int) -> int:
        """Return the position of a document's first token; for ``num_documents``, the number of tokens."""
        ...

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at a position."""
        ...


class MockStore:
    """Random documents: token ids are a hash of their position, lengths follow an exponential law."""

    def __init__(self, num_documents: int, mean_document_length: int, vocab_size: int, eod_id: int) -> None:
        hashes = np.array([mix64(number) for number in range(num_documents)], dtype=np.uint64)
        uniform = (hashes >> np.uint64(11)).astype(np.float64) / 2**53
        lengths = np.maximum(2, np.round(-np.log1p(-uniform) * mean_document_length)).astype(np.int64)
        self.prefix = f"mock-{num_documents}-{mean_document_length}"
        self._starts = np.concatenate(([0], np.cumsum(lengths)))
        self.num_documents = num_documents
        self.num_tokens = int(self._starts[-1])
        self._vocab_size = vocab_size
        self._eod_id = eod_id

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` as int64 [count]."""
        positions = np.arange(start, start + count, dtype=np.uint64)
        hashes = (positions + np.uint64(derive_key("mock"))) * np.uint64(0xBF58476D1CE4E5B9)
        tokens = ((hashes ^ (hashes >> np.uint64(29))) % np.uint64(self._vocab_size)).astype(np.int64)
        tokens[tokens == self._eod_id] = (self._eod_id + 1) % self._vocab_size
        first, last = np.searchsorted(self._starts, [start + 1, start + count + 1])
        tokens[self._starts[first:last] - 1 - start] = self._eod_id  # the last token of each document
        return tokens

    def document_start(self, document: int) -> int:
        """Return the position of a document's first token; for ``num_documents``, the number of tokens."""
        return int(self._starts[document])

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at a position."""
        return int(np.searchsorted(self._starts, token, side="right")) - 1
