"""Best-fit packing: samples of whole documents, cut only where one is longer than a sample.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830). Documents longer than a sample are
cut into pieces of that length; the pieces are packed by best-fit decreasing: the longest first, each into the fullest
sample that has room. What stays free is padding without loss.

The documents are taken in chunks of a million, so that memory stays bounded; the packs are written to two files
(``pieces.bin``: document, offset and length of each piece; ``packs.bin``: where each pack's pieces begin) and mapped
into memory. They do not depend on the seed; the order of packs is a keyed permutation for each epoch.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_llm.data.sampling.keyed_permutation import KeyedPermutation, mix64
from nemo_llm.data.sampling.sample import Sample
from nemo_llm.data.sampling.window_to_sample import SampleRules, Window
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.errors import InputError
from nemo_llm.storage.build_cache import build_once, content_key

DOCUMENTS_PER_CHUNK = 1_000_000
_PIECE = np.dtype([("document", "<i8"), ("offset", "<i8"), ("length", "<i4")])


class PackedDataset:
    """Endless samples of packed documents from ``[first, last)`` of one store."""

    def __init__(
        self, name: str, store: TokenStore, rules: SampleRules, documents: tuple[int, int], order_key: int, packs: Path
    ) -> None:
        """``packs`` is a folder that ``build_packs`` returned for the same store, documents and length."""
        self.name = name
        self.place = store.prefix
        self.rules = rules
        self.seq_length = rules.seq_length
        self.num_documents = documents[1] - documents[0]
        self.num_tokens = store.document_start(documents[1]) - store.document_start(documents[0])
        self._store = store
        self._order_key = order_key
        self._pieces = np.memmap(packs / "pieces.bin", dtype=_PIECE, mode="r")
        self._packs = np.memmap(packs / "packs.bin", dtype="<i8", mode="r")
        self.samples_per_epoch = len(self._packs) - 1
        self.tokens_per_sample = self.num_tokens / self.samples_per_epoch
        self._order = (0, self._build_order(0))

    def sample(self, index: int, run_index: int) -> Sample:
        """Return sample ``index`` of the source, which is number ``run_index`` of the run."""
        size = self.seq_length + 1
        tokens = np.full(size, self.rules.eod_id, dtype=np.int64)
        learned = np.ones(size, dtype=np.float32) if self._store.has_learned else None
        targets = np.zeros(size, dtype=np.float32) if self._store.has_targets else None
        starts, position = [], 0
        for piece in self._pieces_of(index):
            length = int(piece["length"])
            start = self._store.document_start(int(piece["document"])) + int(piece["offset"])
            tokens[position : position + length] = self._store.read(start, length)
            if learned is not None:
                learned[position : position + length] = self._store.read_learned(start, length)
            if targets is not None:
                targets[position + length - 1] = self._store.target(int(piece["document"]))
            starts.append(position)
            position += length
        if position < size - 1:
            starts.append(position)  # the padding is a document of its own
        at = np.asarray(starts, dtype=np.int64)
        window = Window(tokens, at, position, runs_on=False, learned=learned, targets=targets)
        return self.rules.sample(window, mix64(self._order_key ^ mix64(index)), run_index)

    def documents_of(self, index: int) -> list[tuple[int, int]]:
        """Return the documents in sample ``index``, each as a range of one."""
        return [(int(document), int(document)) for document in self._pieces_of(index)["document"]]

    def _pieces_of(self, index: int) -> NDArray:
        epoch, position = divmod(index, self.samples_per_epoch)
        kept, permutation = self._order
        if kept != epoch:
            permutation = self._build_order(epoch)
            self._order = (epoch, permutation)  # one assignment: a loader's thread may look in between
        pack = permutation(position)
        return self._pieces[int(self._packs[pack]) : int(self._packs[pack + 1])]

    def _build_order(self, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(self.samples_per_epoch, mix64(self._order_key ^ mix64(epoch)))


def build_packs(store: TokenStore, documents: tuple[int, int], shape: tuple[int, bool], cache: Path) -> Path:
    """Return the folder of packs for some documents of a store, building it in the cache the first time.

    ``shape`` is the sequence length, and whether each document (or piece of one) has a sample to itself. Raises
    InputError when there is nothing to pack.
    """
    if store.document_start(documents[1]) == store.document_start(documents[0]):
        raise InputError(f"{store.prefix}: documents {documents[0]} to {documents[1]} hold no token to pack")
    seq_length, alone = shape
    named = {"kind": "alone"} if alone else {"kind": "packs", "format": 1}
    key = content_key(**named, store=store.identity, documents=list(documents), seq_length=seq_length)
    folder = cache / f"packs-{key}"

    def build(temporary: Path) -> dict:
        num_packs = num_pieces = 0
        with (temporary / "pieces.bin").open("wb") as pieces, (temporary / "packs.bin").open("wb") as packs:
            for chunk, lengths in _pack_chunks(store, documents, seq_length + 1, alone):
                pieces.write(chunk.tobytes())
                packs.write((num_pieces + np.cumsum(lengths) - lengths).astype("<i8").tobytes())
                num_packs, num_pieces = num_packs + len(lengths), num_pieces + len(chunk)
            packs.write(np.asarray([num_pieces], dtype="<i8").tobytes())
        return {"packs": num_packs, "pieces": num_pieces}

    build_once(folder, build)
    return folder


def _pack_chunks(
    store: TokenStore, documents: tuple[int, int], capacity: int, alone: bool
) -> Iterator[tuple[NDArray, NDArray[np.int64]]]:
    """Yield, for each chunk of documents, its pieces in the order of their packs and the number of each pack's."""
    for first in range(documents[0], documents[1], DOCUMENTS_PER_CHUNK):
        last = min(documents[1], first + DOCUMENTS_PER_CHUNK)
        starts = np.fromiter((store.document_start(number) for number in range(first, last + 1)), np.int64)
        pieces = _cut_long(np.diff(starts), first, capacity)
        if alone:
            order, lengths = np.arange(len(pieces)), np.ones(len(pieces), dtype=np.int64)
        else:
            order, lengths = best_fit(pieces["length"], capacity)
        yield pieces[order], lengths


def _cut_long(lengths: NDArray[np.int64], first: int, capacity: int) -> NDArray:
    """Return the pieces of documents: none for an empty one, several for one longer than ``capacity``."""
    counts = -(-lengths // capacity)
    pieces = np.empty(int(counts.sum()), dtype=_PIECE)
    index = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces["document"] = first + index
    pieces["offset"] = number * capacity
    pieces["length"] = np.minimum(lengths[index] - number * capacity, capacity)
    return pieces


def best_fit(lengths: NDArray[np.integer], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack items of ``lengths`` [n] (each 1 to ``capacity``) by best-fit decreasing.

    Returns the items' numbers in the order of their packs [n], and the number of items of each pack. Open packs wait in
    a list for each free length, and the bits of one integer say which lists hold any: the smallest one that fits is
    its lowest bit from the item's length on.
    """
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    pack_of = np.empty(len(lengths), dtype=np.int64)
    packs = 0
    for item in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[item])
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            pack = waiting[free].pop()
            if not waiting[free]:
                occupied ^= 1 << free
        else:
            free, pack = capacity, packs
            packs += 1
        pack_of[item] = pack
        rest = free - length
        if rest:
            waiting[rest].append(pack)
            occupied |= 1 << rest
    return np.argsort(pack_of, kind="stable"), np.bincount(pack_of, minlength=packs)
