"""Sources of random documents, for benchmarks and tests: no file is read."""

import numpy as np
from numpy.typing import NDArray

from nemo_llm.config.sections.sources import MockSource
from nemo_llm.data.sampling.keyed_permutation import derive_key, mix64
from nemo_llm.data.sources.kind import OpenContext, SourceKind
from nemo_llm.data.sources.token_store import TokenStore


class MockStore(TokenStore):
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


class MockKind(SourceKind[MockSource]):
    """Random documents with ids of the run's vocabulary."""

    def open(self, context: OpenContext) -> MockStore:
        """Draw the lengths."""
        entry = self.entry
        return MockStore(entry.num_documents, entry.mean_document_length, context.vocab_size, context.tokenizer.eod_id)

    def unread_bytes(self) -> int:
        """None."""
        return 0
