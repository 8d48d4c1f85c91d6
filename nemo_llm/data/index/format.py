"""Megatron's indexed datasets, read and written without torch or Megatron.

``PREFIX.bin`` holds the tokens of all sequences one after the other. ``PREFIX.idx`` is little-endian: 9 bytes magic,
u64 version 1, u8 dtype code, u64 number of sequences S, u64 length D of the document index (documents + 1), then
int32[S] lengths in tokens, int64[S] byte offsets into ``.bin``, int64[D] the sequence at which each document starts
(first 0, last S). Files made here and by ``megatron.core.datasets.indexed_dataset`` are byte for byte the same.
"""

import bisect
import os
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from nemo_llm.errors import InputError
from nemo_llm.storage.atomic_files import sync_stream

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_TOKEN_CODES = (1, 3, 4, 5, 8)
_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype for ids below ``vocab_size``: uint16 exactly when they fit (65,536 ids), else int32.

    Megatron's own writer already changes to int32 at 65,500, while its reader without a header
    (``GPTDatasetConfig.sequences_per_dataset``) takes uint16 for granted up to 65,536 and misreads the int32 files in
    between. uint16 up to 65,536 is right for both of its readers.
    """
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


class IndexedDataset:
    """A memory-mapped indexed dataset. Opening reads the header and checks sizes; no array is copied.

    Raises InputError when a file is missing, truncated or not an indexed dataset, naming the file.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise InputError(f"{path}: no such file; an indexed dataset is a pair {self.prefix}.bin and .idx")
        self.dtype, self.num_sequences, index_entries = self._read_header()
        self.num_documents = index_entries - 1
        self._map_index(index_entries)
        self._map_tokens()

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, sequence: int) -> NDArray[np.integer]:
        """Return the tokens of one sequence, a read-only view."""
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} is outside [0, {self.num_sequences}) of {self.prefix}")
        start = int(self.sequence_pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[sequence])]

    def document(self, document: int) -> NDArray[np.integer]:
        """Return the tokens of one document (all its sequences), a read-only view."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} is outside [0, {self.num_documents}) of {self.prefix}")
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` as int64 [count], a copy."""
        return self.tokens[start : start + count].astype(np.int64)

    def document_start(self, document: int) -> int:
        """Return the position in ``tokens`` of a document's first token; for ``num_documents`` their total."""
        sequence = int(self.document_indices[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.sequence_pointers[sequence]) // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at this position: a binary search in the mapped index.

        Written out because ``np.searchsorted`` would copy the whole array, which is never aligned after a header of
        34 bytes.
        """
        return bisect.bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def validate(self) -> int:
        """Read everything: lengths, offsets, document index and tokens, in chunks. Return the largest token id.

        Raises InputError naming the first wrong entry.
        """
        expected = 0
        for start in range(0, self.num_sequences, _CHUNK):
            lengths = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise InputError(f"{self.idx_path}: sequence {start + int(np.argmin(lengths))} has a negative length")
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            offsets = np.concatenate(([expected], ends[:-1]))
            wrong = np.nonzero(self.sequence_pointers[start : start + _CHUNK] != offsets)[0]
            if wrong.size:
                at = start + int(wrong[0])
                raise InputError(
                    f"{self.idx_path}: sequence {at} should start at byte {int(offsets[wrong[0]])} of the .bin file, "
                    f"the index says {int(self.sequence_pointers[at])}; rebuild the dataset"
                )
            expected = int(ends[-1])
        self._validate_documents()
        largest = -1
        for start in range(0, self.num_tokens, _CHUNK):
            chunk = self.tokens[start : start + _CHUNK]
            if chunk.min() < 0:
                raise InputError(f"{self.bin_path}: negative token id at token {start + int(np.argmin(chunk))}")
            largest = max(largest, int(chunk.max()))
        return largest

    def _validate_documents(self) -> None:
        for start in range(0, self.num_documents, _CHUNK):
            steps = np.diff(self.document_indices[start : start + _CHUNK + 1])
            if steps.min() < 0:
                raise InputError(f"{self.idx_path}: document {start + int(np.argmin(steps))} ends before it starts")

    def _read_header(self) -> tuple[np.dtype, int, int]:
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as stream:
            header = stream.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or header[:9] != MAGIC:
            raise InputError(f"{self.idx_path}: not the index of an indexed dataset (it begins with {header[:9]!r})")
        version, code, sequences, documents = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in _TOKEN_CODES:
            raise InputError(f"{self.idx_path}: version {version} with dtype code {code} is not a dataset of token ids")
        expected = HEADER_BYTES + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # a multimodal index ends with one mode byte a sequence
            raise InputError(
                f"{self.idx_path}: {size} bytes, but {sequences} sequences and {documents} index entries take "
                f"{expected}; the file is truncated or damaged, rebuild it"
            )
        if documents < 1:
            raise InputError(f"{self.idx_path}: the document index is empty; rebuild the dataset")
        return np.dtype(_DTYPES[code]), sequences, documents

    def _map_index(self, index_entries: int) -> None:
        buffer = np.memmap(self.idx_path, mode="r")
        pointers_at = HEADER_BYTES + 4 * self.num_sequences
        self.sequence_lengths = np.frombuffer(buffer, "<i4", self.num_sequences, HEADER_BYTES)
        self.sequence_pointers = np.frombuffer(buffer, "<i8", self.num_sequences, pointers_at)
        self.document_indices = np.frombuffer(buffer, "<i8", index_entries, pointers_at + 8 * self.num_sequences)
        first, last = int(self.document_indices[0]), int(self.document_indices[-1])
        if first != 0 or last != self.num_sequences:
            raise InputError(
                f"{self.idx_path}: documents span sequences {first} to {last} instead of 0 to {self.num_sequences}; "
                "the index is damaged, rebuild it"
            )

    def _map_tokens(self) -> None:
        size = self.bin_path.stat().st_size
        expected = 0
        if self.num_sequences:
            expected = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if size != expected:
            raise InputError(
                f"{self.bin_path}: {size} bytes, but its index needs {expected}; one of the two files is truncated or "
                "belongs to another dataset"
            )
        self.num_tokens = size // self.dtype.itemsize
        buffer = np.memmap(self.bin_path, mode="r") if size else np.empty(0, dtype=np.uint8)
        self.tokens = np.frombuffer(buffer, self.dtype)


class IndexedDatasetWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx`` document by document in flat memory.

    Everything goes to temporary files beside them; ``finalize`` syncs and renames, the index last, so that a dataset
    is complete or absent. Used as a context manager, an error removes the temporary files.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._paths = {
            kind: Path(f"{self.prefix}.{kind}.tmp-{os.getpid()}") for kind in ("bin", "lengths", "documents", "idx")
        }
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._streams = {kind: self._paths[kind].open("wb") for kind in ("bin", "lengths", "documents")}
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0
        self._limit = np.iinfo(self.dtype).max

    def add_document(self, tokens: NDArray[np.integer] | list[int], lengths: list[int] | None = None) -> None:
        """Append one document: its tokens, and the lengths of its sequences when it has more than one.

        Raises ValueError for an id that the dtype cannot hold or lengths that do not sum up.
        """
        array = np.asarray(tokens)
        if array.size and (array.min() < 0 or array.max() > self._limit):
            raise ValueError(f"token ids must lie in [0, {self._limit}], received {array.min()} to {array.max()}")
        lengths = [array.size] if lengths is None else lengths
        if sum(lengths) != array.size:
            raise ValueError(f"sequence lengths sum to {sum(lengths)}, the document has {array.size} tokens")
        self._streams["bin"].write(array.astype(self.dtype, copy=False).tobytes())
        self._streams["lengths"].write(np.asarray(lengths, dtype="<i4").tobytes())
        self.num_sequences += len(lengths)
        self._streams["documents"].write(struct.pack("<q", self.num_sequences))
        self.num_documents += 1
        self.num_tokens += int(array.size)

    def append_dataset(self, prefix: str | Path) -> None:
        """Append all documents of another dataset of the same dtype (InputError otherwise)."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise InputError(f"{prefix}: dtype {other.dtype}, but {self.prefix} is written as {self.dtype}")
        with other.bin_path.open("rb") as stream:
            shutil.copyfileobj(stream, self._streams["bin"], 1 << 22)
        for start in range(0, other.num_sequences, _CHUNK):
            self._streams["lengths"].write(other.sequence_lengths[start : start + _CHUNK].tobytes())
        for start in range(1, len(other.document_indices), _CHUNK):
            ends = other.document_indices[start : start + _CHUNK] + self.num_sequences
            self._streams["documents"].write(ends.astype("<i8").tobytes())
        self.num_sequences += other.num_sequences
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens

    def finalize(self) -> None:
        """Write the index, sync both files and publish them by rename."""
        for stream in self._streams.values():
            sync_stream(stream)
            stream.close()
        write_index(self._paths["idx"], self.dtype, self._paths["lengths"], self._paths["documents"])
        # An old index must not describe new tokens, even for a moment: it goes first and the new one comes last.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        self._paths["bin"].replace(self.prefix + ".bin")
        self._paths["idx"].replace(self.prefix + ".idx")
        self._remove_temporary()

    def abort(self) -> None:
        """Close and remove the temporary files; nothing is published."""
        for stream in self._streams.values():
            stream.close()
        self._remove_temporary()

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()

    def _remove_temporary(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def write_index(path: Path, dtype: np.dtype, lengths_path: Path, documents_path: Path | None) -> None:
    """Write and sync an index file in flat memory.

    ``lengths_path`` holds int32 lengths of sequences; ``documents_path`` int64 numbers of sequences up to the end of
    each document, or None when each sequence is a document.
    """
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    sequences = lengths_path.stat().st_size // 4
    documents = sequences if documents_path is None else documents_path.stat().st_size // 8
    with path.open("wb") as stream:
        stream.write(MAGIC)
        stream.write(struct.pack("<QBQQ", 1, code, sequences, documents + 1))
        with lengths_path.open("rb") as lengths:
            shutil.copyfileobj(lengths, stream, 1 << 22)
        _write_pointers(stream, lengths_path, dtype.itemsize)
        stream.write(struct.pack("<q", 0))
        if documents_path is None:
            for start in range(1, sequences + 1, _CHUNK):
                stream.write(np.arange(start, min(start + _CHUNK, sequences + 1), dtype="<i8").tobytes())
        else:
            with documents_path.open("rb") as ends:
                shutil.copyfileobj(ends, stream, 1 << 22)
        sync_stream(stream)


def _write_pointers(stream: IO[bytes], lengths_path: Path, itemsize: int) -> None:
    offset = 0
    with lengths_path.open("rb") as lengths:
        while chunk := lengths.read(4 * _CHUNK):
            ends = offset + np.cumsum(np.frombuffer(chunk, "<i4").astype(np.int64)) * itemsize
            stream.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
