"""Tokenises one shard into a file of tokens and a file of document lengths."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from nemo_llm.corpus.documents import BadRecord, BadRecordError, as_path, plain_text_blocks
from nemo_llm.corpus.shards import Shard, is_stream, read_shard
from nemo_llm.data.index.format import token_dtype
from nemo_llm.data.index.plan import IndexSettings
from nemo_llm.errors import InputError
from nemo_llm.storage.atomic_files import replacing
from nemo_llm.tokenizers.document_encoder import DocumentEncoder, build_encoder
from nemo_llm.tokenizers.tokenizer import load_tokenizer

_BATCH_CHARACTERS = 1 << 20
_MAX_EXAMPLES = 5


@dataclass(slots=True)
class ShardReport:
    """What came out of one shard, or of many added up."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    max_token_id: int = -1
    bad: dict[str, int] = field(default_factory=dict)
    """Bad records by reason."""
    bad_examples: list[str] = field(default_factory=list)
    """The first few, with file and line."""

    def add(self, other: "ShardReport") -> None:
        """Add another report to this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.characters += other.characters
        self.max_token_id = max(self.max_token_id, other.max_token_id)
        for reason, count in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
        self.bad_examples = (self.bad_examples + other.bad_examples)[:_MAX_EXAMPLES]


class ShardTokeniser:
    """Holds a tokenizer and its encoder, and turns shards into files; one in each worker."""

    def __init__(self, settings: IndexSettings, encoder: DocumentEncoder) -> None:
        self._settings = settings
        self._dtype = token_dtype(encoder.tokenizer.vocab_size)
        self._eod = np.asarray([encoder.tokenizer.eod_id] if settings.append_eod else [], dtype=self._dtype)
        self.encoder = encoder

    def run(self, shard: Shard, stem: Path) -> ShardReport:
        """Write ``stem.bin`` and ``stem.lengths``; they appear complete, or not at all."""
        report = ShardReport()
        # Not synced: the journal copies them and syncs the copy.
        files = [replacing(stem.with_name(f"{stem.name}.{kind}"), sync=False) for kind in ("bin", "lengths")]
        with files[0] as tokens, files[1] as lengths:
            writer = _ShardWriter(tokens, lengths, self._dtype, self._eod, report)
            if is_stream(shard, self._settings.text_format):
                self._stream(shard, writer, report)
            else:
                self._documents(shard, writer, report)
        return report

    def _documents(self, shard: Shard, writer: "_ShardWriter", report: ShardReport) -> None:
        texts: list[str] = []
        characters = 0
        for item in read_shard(shard, self._settings.text_format):
            if isinstance(item, BadRecord):
                self._bad(item, report)
                continue
            texts.append(item.text)
            characters += len(item.text)
            if characters >= _BATCH_CHARACTERS:
                writer.add(self.encoder.encode(texts), characters)
                texts, characters = [], 0
        writer.add(self.encoder.encode(texts), characters)

    def _stream(self, shard: Shard, writer: "_ShardWriter", report: ShardReport) -> None:
        blocks = _Counted(plain_text_blocks(as_path(shard.file), self._settings.encoding))
        try:
            writer.add_pieces(self.encoder.encode_blocks(blocks))
        except BadRecordError as error:
            self._bad(error.record, report)
            return
        report.characters += blocks.characters
        if not blocks.characters:
            self._bad(BadRecord(shard.file, 1, "empty document", "no text"), report)

    def _bad(self, record: BadRecord, report: ShardReport) -> None:
        if self._settings.on_bad_record == "error":
            raise BadRecordError(record)
        report.bad[record.reason] = report.bad.get(record.reason, 0) + 1
        if len(report.bad_examples) < _MAX_EXAMPLES:
            report.bad_examples.append(str(record))


class _ShardWriter:
    """Writes documents in the dataset's dtype and keeps the report."""

    def __init__(
        self, tokens: IO[bytes], lengths: IO[bytes], dtype: np.dtype, eod: NDArray, report: ShardReport
    ) -> None:
        self._tokens, self._lengths = tokens, lengths
        self._dtype, self._eod, self._report = dtype, eod, report

    def add(self, documents: list[NDArray[np.integer]], characters: int) -> None:
        """Write whole documents."""
        if not documents:
            return
        arrays = [array for ids in documents for array in (ids.astype(self._dtype), self._eod)]
        joined = np.concatenate(arrays)
        self._tokens.write(joined.tobytes())
        sizes = np.array([len(ids) for ids in documents], dtype=np.int64) + len(self._eod)
        self._count(joined, sizes)
        self._report.characters += characters

    def add_pieces(self, pieces: Iterator[NDArray[np.integer]]) -> None:
        """Write one document that arrives in pieces; an error on the way leaves nothing of it."""
        start = self._tokens.tell()
        length, largest = 0, -1
        try:
            for ids in pieces:
                self._tokens.write(ids.astype(self._dtype).tobytes())
                length += len(ids)
                largest = max(largest, int(ids.max()) if ids.size else -1)
        except BadRecordError:
            self._tokens.seek(start)
            self._tokens.truncate()
            raise
        if length:
            self._tokens.write(self._eod.tobytes())
            self._report.max_token_id = max(self._report.max_token_id, largest)
            self._count(self._eod, np.array([length + len(self._eod)], dtype=np.int64))

    def _count(self, tokens: NDArray, sizes: NDArray[np.int64]) -> None:
        if sizes.max() > np.iinfo(np.int32).max:
            raise InputError(f"a document of {sizes.max()} tokens does not fit the format's 32-bit length; cut it")
        self._lengths.write(sizes.astype("<i4").tobytes())
        self._report.documents += len(sizes)
        self._report.tokens += int(sizes.sum())
        self._report.max_token_id = max(self._report.max_token_id, int(tokens.max()) if tokens.size else -1)


class _Counted:
    """An iterator of blocks that counts the characters going through."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for block in self._blocks:
            self.characters += len(block)
            yield block


@dataclass(frozen=True)
class PoolJob:
    """What all tasks of a pool share; a worker finds by it what it has built."""

    settings: IndexSettings
    cache: Path
    fast: bool

    def __hash__(self) -> int:
        return hash(repr(self))


def start_worker(job: PoolJob) -> None:
    """Prepare a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _tokeniser(job)


def run_in_worker(job: PoolJob, shard: Shard, stem: Path) -> ShardReport:
    """Tokenise one shard in a worker process."""
    return _tokeniser(job).run(shard, stem)


@functools.cache
def _tokeniser(job: PoolJob) -> ShardTokeniser:
    return ShardTokeniser(job.settings, build_encoder(load_tokenizer(job.settings.tokenizer), job.cache, fast=job.fast))
