"""Fixed-length samples from concatenated documents, in an order that is a pure function of (seed, source, index).

The documents of a source stand one after the other in its file. A sample is a window of ``seq_length + 1`` tokens, and
windows follow each other at a stride of ``seq_length`` (the last token of one is the first of the next, so that each
token is a label once). Epoch ``e`` visits all windows in the order of a permutation keyed by (seed, source, e), and
starts its windows at an offset drawn from the tokens that do not fill a whole window. Nothing is precomputed or stored.
"""

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemo_llm.data.sampling.keyed_permutation import KeyedPermutation, mix64
from nemo_llm.data.sampling.sample import Sample
from nemo_llm.data.sampling.window_to_sample import SampleRules, Window
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.errors import InputError


class EndlessSource(Protocol):
    """Samples of one source, without end: epoch after epoch, each sample of an epoch once."""

    name: str
    place: str
    """The dataset's prefix, or what stands for it."""
    seq_length: int
    num_documents: int
    num_tokens: int
    samples_per_epoch: int
    tokens_per_sample: float
    """Mean number of tokens that are not padding."""

    def sample(self, index: int, run_index: int) -> Sample:
        """Return sample ``index`` of the source, which is number ``run_index`` of the run."""
        ...

    def documents_of(self, index: int) -> list[tuple[int, int]]:
        """Return the ranges (first, last; inclusive) of documents in the inputs of sample ``index``."""
        ...


class TokenWindowDataset:
    """Endless samples from the documents ``[first, last)`` of one store, cut into windows."""

    def __init__(
        self, name: str, store: TokenStore, rules: SampleRules, documents: tuple[int, int], order_key: int
    ) -> None:
        """``order_key`` seeds the order. Raises InputError when the documents do not fill one sample."""
        self.name = name
        self.place = store.prefix
        self.store = store
        self.rules = rules
        self.seq_length = rules.seq_length
        self.num_documents = documents[1] - documents[0]
        self.first_token = store.document_start(documents[0])
        self.num_tokens = store.document_start(documents[1]) - self.first_token
        self.samples_per_epoch = (self.num_tokens - 1) // self.seq_length
        self.tokens_per_sample = float(self.seq_length)
        if self.samples_per_epoch < 1:
            raise InputError(
                f"source {name}: documents {documents[0]} to {documents[1]} hold {self.num_tokens} tokens, but one "
                f"sample needs data.seq_length + 1 = {self.seq_length + 1}; give more text, a shorter data.seq_length "
                "or another data.split"
            )
        self._order_key = order_key
        self._order = (0, *self._build_order(0))

    def window_start(self, index: int) -> int:
        """Return the position in the store of the first token of sample ``index`` (of any epoch)."""
        epoch, position = divmod(index, self.samples_per_epoch)
        permutation, offset = self._order_of(epoch)
        return self.first_token + offset + permutation(position) * self.seq_length

    def sample(self, index: int, run_index: int) -> Sample:
        """Return sample ``index`` of the source, which is number ``run_index`` of the run."""
        start = self.window_start(index)
        size = self.seq_length + 1
        starts = self._document_starts(start, size) if self.rules.needs_starts else _FIRST
        window = Window(self.store.read(start, size), starts, size, runs_on=True)
        return self.rules.sample(window, mix64(self._order_key ^ mix64(index)), run_index)

    def documents_of(self, index: int) -> list[tuple[int, int]]:
        """Return the range (first, last; inclusive) of documents in the inputs of sample ``index``."""
        start = self.window_start(index)
        return [(self.store.document_at(start), self.store.document_at(start + self.seq_length - 1))]

    def _document_starts(self, start: int, size: int) -> NDArray[np.int64]:
        """Return where documents start within a window; the first one starts at 0 whatever it has lost."""
        store, starts = self.store, [0]
        document = store.document_at(start) + 1
        while document < store.num_documents and (place := store.document_start(document) - start) < size:
            if place > starts[-1]:  # documents without tokens start where the next one does
                starts.append(place)
            document += 1
        return np.asarray(starts, dtype=np.int64)

    def _order_of(self, epoch: int) -> tuple[KeyedPermutation, int]:
        """Return the epoch's permutation of windows and the offset of its first one; the last used is kept."""
        kept, permutation, offset = self._order
        if kept != epoch:
            permutation, offset = self._build_order(epoch)
            self._order = (epoch, permutation, offset)  # one assignment: a loader's thread may look in between
        return permutation, offset

    def _build_order(self, epoch: int) -> tuple[KeyedPermutation, int]:
        key = mix64(self._order_key ^ mix64(epoch))
        unused = self.num_tokens - 1 - self.samples_per_epoch * self.seq_length
        return KeyedPermutation(self.samples_per_epoch, key), mix64(key) % (unused + 1)


_FIRST = np.zeros(1, dtype=np.int64)


class VirtualTokenSource:
    """A source whose samples begin with ids ``-1, -2, ...``, which stand for virtual tokens and carry no loss.

    Prompt tuning makes room for its virtual tokens in front of every sample of running text this way.

    ``inner`` gives samples shorter by their number.
    """

    def __init__(self, inner: EndlessSource, num_tokens: int) -> None:
        self._inner = inner
        self._ids = -1 - np.arange(num_tokens, dtype=np.int64)
        self.name, self.place = inner.name, inner.place
        self.seq_length = inner.seq_length + num_tokens
        self.num_documents, self.num_tokens = inner.num_documents, inner.num_tokens
        self.samples_per_epoch, self.tokens_per_sample = inner.samples_per_epoch, inner.tokens_per_sample

    def sample(self, index: int, run_index: int) -> Sample:
        """Return sample ``index`` of the source, which is number ``run_index`` of the run."""
        sample, count = self._inner.sample(index, run_index), len(self._ids)
        documents, padding = sample.document_ids, sample.padding
        return dataclasses.replace(
            sample,
            tokens=np.concatenate((self._ids, sample.tokens)),
            loss_mask=np.concatenate((np.zeros(count, dtype=np.float32), sample.loss_mask)),
            position_ids=np.concatenate((np.arange(count, dtype=np.int64), sample.position_ids + count)),
            document_ids=None
            if documents is None
            else np.concatenate((np.zeros(count, dtype=documents.dtype), documents)),
            padding=None if padding is None else np.concatenate((np.zeros(count, dtype=np.bool_), padding)),
        )

    def documents_of(self, index: int) -> list[tuple[int, int]]:
        """Return the ranges of documents in sample ``index``."""
        return self._inner.documents_of(index)
