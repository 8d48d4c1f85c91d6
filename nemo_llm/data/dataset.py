"""Fixed-length samples from concatenated documents, in an order that is a pure function of (seed, source, index).

The documents of a source stand one after the other in its file. A sample is a window of ``seq_length + 1`` tokens, and
windows follow each other at a stride of ``seq_length`` (the last token of one is the first of the next, so that each
token is a label once). Epoch ``e`` visits all windows in the order of a permutation keyed by (seed, source, e), and
starts its windows at an offset drawn from the tokens that do not fill a whole window. Nothing is precomputed or stored.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_llm.data.blend import Blend
from nemo_llm.data.permutation import KeyedPermutation, derive_key, mix64
from nemo_llm.data.sample import Sample
from nemo_llm.errors import InputError


class TokenStore(Protocol):
    """Documents of tokens one after the other: an indexed dataset or a mock."""

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


class SampleRules:
    """How a window becomes a sample: document resets and loss mask, with the arrays that all samples share."""

    def __init__(
        self, *, seq_length: int, eod_id: int, reset_position_ids: bool, reset_attention_mask: bool, eod_mask_loss: bool
    ) -> None:
        self.seq_length = seq_length
        self.eod_id = eod_id
        self.reset_position_ids = reset_position_ids
        self.reset_attention_mask = reset_attention_mask
        self.eod_mask_loss = eod_mask_loss
        self._positions = _read_only(np.arange(seq_length, dtype=np.int64))
        self._ones = _read_only(np.ones(seq_length, dtype=np.float32))

    def sample(self, store: TokenStore, start: int) -> Sample:
        """Return the sample whose tokens start at position ``start`` of the store."""
        tokens = store.read(start, self.seq_length + 1)
        loss_mask, position_ids, document_ids = self._ones, self._positions, None
        if self.eod_mask_loss:
            loss_mask = (tokens[:-1] != self.eod_id).astype(np.float32)
        if self.reset_position_ids or self.reset_attention_mask:
            starts = self._document_starts(store, start)
            lengths = np.diff(np.append(starts, self.seq_length))
            if self.reset_position_ids:
                position_ids = self._positions - np.repeat(starts, lengths)
            if self.reset_attention_mask:
                document_ids = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
        return Sample(tokens, loss_mask, position_ids, document_ids)

    def _document_starts(self, store: TokenStore, start: int) -> NDArray[np.int64]:
        """Return where documents start within the inputs of a window; the first one starts at 0 whatever it lost."""
        starts = [0]
        document = store.document_at(start) + 1
        while document < store.num_documents and (place := store.document_start(document) - start) < self.seq_length:
            if place > starts[-1]:  # documents without tokens start where the next one does
                starts.append(place)
            document += 1
        return np.asarray(starts, dtype=np.int64)


class TokenWindowDataset:
    """Endless (training) or one-pass (validation) samples from the documents ``[first, last)`` of one source."""

    def __init__(
        self, name: str, store: TokenStore, rules: SampleRules, documents: tuple[int, int], order_key: int
    ) -> None:
        """``order_key`` seeds the order. Raises InputError when the documents do not fill one sample."""
        self.name = name
        self.store = store
        self.rules = rules
        self.seq_length = rules.seq_length
        self.documents = documents
        self.first_token = store.document_start(documents[0])
        self.num_tokens = store.document_start(documents[1]) - self.first_token
        self.windows_per_epoch = (self.num_tokens - 1) // self.seq_length
        if self.windows_per_epoch < 1:
            raise InputError(
                f"source {name}: documents {documents[0]} to {documents[1]} hold {self.num_tokens} tokens, but one "
                f"sample needs data.seq_length + 1 = {self.seq_length + 1}; give more text, a shorter data.seq_length "
                "or another data.split"
            )
        self._order_key = order_key
        self._order = (0, *self._build_order(0))

    def window_start(self, index: int) -> int:
        """Return the position in the store of the first token of sample ``index`` (of any epoch)."""
        epoch, position = divmod(index, self.windows_per_epoch)
        permutation, offset = self._order_of(epoch)
        return self.first_token + offset + permutation(position) * self.seq_length

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"sample {index} of source {self.name} is negative")
        return self.rules.sample(self.store, self.window_start(index))

    def _order_of(self, epoch: int) -> tuple[KeyedPermutation, int]:
        """Return the epoch's permutation of windows and the offset of its first one; the last used is kept."""
        kept, permutation, offset = self._order
        if kept != epoch:
            permutation, offset = self._build_order(epoch)
            self._order = (epoch, permutation, offset)  # one assignment: a loader's thread may look in between
        return permutation, offset

    def _build_order(self, epoch: int) -> tuple[KeyedPermutation, int]:
        key = mix64(self._order_key ^ mix64(epoch))
        unused = self.num_tokens - 1 - self.windows_per_epoch * self.seq_length
        return KeyedPermutation(self.windows_per_epoch, key), mix64(key) % (unused + 1)


class BlendedSource:
    """Samples of several sources, mixed by a ``Blend``; finite when ``num_samples`` is given."""

    def __init__(
        self, sources: Sequence[TokenWindowDataset], weights: Sequence[float], seed: int, num_samples: int | None = None
    ) -> None:
        self.sources = list(sources)
        self.blend = Blend(weights, seed)
        self.seq_length = self.sources[0].seq_length
        self.num_samples = num_samples

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("a training source has no length: it repeats its data for as long as it is asked")
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if self.num_samples is not None and index >= self.num_samples:
            raise IndexError(f"sample {index} is beyond the {self.num_samples} samples of this set")
        source, local = self.blend.locate(index)
        return self.sources[source][local]

    def describe(self, num_samples: int | None = None) -> str:
        """Return a table of the sources: tokens, share, and what ``num_samples`` samples take of each in epochs."""
        count = self.num_samples if num_samples is None else num_samples
        taken = self.blend.counts(count or 0)
        lines = [f"{'source':<24} {'documents':>11} {'tokens':>15} {'share':>8} {'samples':>12} {'epochs':>9}"]
        for source, share, samples in zip(self.sources, self.blend.shares, taken, strict=True):
            documents = source.documents[1] - source.documents[0]
            lines.append(
                f"{source.name:<24.24} {documents:>11,} {source.num_tokens:>15,} {share:>8.4f} {samples:>12,} "
                f"{samples / source.windows_per_epoch:>9.3f}"
            )
        return "\n".join(lines)


class MockStore:
    """Random documents in constant memory a token: token ids are a hash of their position."""

    def __init__(self, num_documents: int, mean_document_length: int, vocab_size: int, eod_id: int) -> None:
        hashes = np.array([mix64(number) for number in range(num_documents)], dtype=np.uint64)
        uniform = (hashes >> np.uint64(11)).astype(np.float64) / 2**53
        lengths = np.maximum(2, np.round(-np.log1p(-uniform) * mean_document_length)).astype(np.int64)
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


def _read_only(array: NDArray) -> NDArray:
    array.setflags(write=False)
    return array
