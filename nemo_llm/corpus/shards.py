"""The one reader of text: input files cut into shards, and the documents of a shard.

Preparing, indexing and training tokenizers all read through here, so that they agree on what a document is. How inputs
are cut does not depend on the number of workers, so that an interrupted run can go on with another number.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemo_llm.corpus.documents import (
    COMPRESSION,
    BadRecord,
    Document,
    as_path,
    expand_inputs,
    file_format,
    file_state,
    open_bytes,
    open_stream,
    parse_documents,
    parse_json_line,
    parse_text_line,
    reading,
)
from nemo_llm.errors import InputError

_MIN_SHARD_BYTES = 1 << 20
_MAX_SHARD_BYTES = 1 << 24
_SCAN_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How documents stand in files."""

    text_key: str
    """The field (JSON lines) or column (Parquet) that holds the text."""
    plain_text: str
    """Plain text: is a ``file`` or a ``line`` one document."""
    encoding: str
    """Encoding of JSON lines and plain text."""
    keep_fields: tuple[str, ...] = ()
    """Other fields or columns to carry along with a document, where it has them."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of one input file: a whole file, or the lines that begin in ``[start, stop)`` of its bytes."""

    file: str
    start: int
    stop: int | None
    """None: the whole file."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input files as they stood, and their shards in order."""

    files: tuple[tuple[str, int, int], ...]
    """Path, bytes, and time of change in nanoseconds."""
    shards: tuple[Shard, ...]

    def check_unchanged(self, what: str) -> None:
        """Raise InputError if a file has changed since; ``what`` is what was being done to it: ``indexed``."""
        for file, size, changed in self.files:
            if file_state(as_path(file)) != (size, changed):
                raise InputError(f"{file}: changed while it was {what}; pass restart=true and run again")


def cut_inputs(patterns: list[str], text_format: TextFormat) -> Inputs:
    """Cut files, folders and globs into shards; raises InputError for missing files or an encoding unknown here."""
    _check_encoding(text_format.encoding)
    files = sorted({file.resolve() for pattern in patterns for file in expand_inputs(pattern)}, key=str)
    states = [file_state(file) for file in files]
    total = sum(size for size, _ in states)
    shard_bytes = min(_MAX_SHARD_BYTES, max(_MIN_SHARD_BYTES, total // 64))
    shards = [
        shard
        for file, (size, _) in zip(files, states, strict=True)
        for shard in _shards_of(file, size, shard_bytes, text_format)
    ]
    return Inputs(tuple((str(file), *state) for file, state in zip(files, states, strict=True)), tuple(shards))


def is_stream(shard: Shard, text_format: TextFormat) -> bool:
    """Return whether a shard is one plain text document, to be read as a stream."""
    return shard.stop is None and text_format.plain_text == "file" and file_format(as_path(shard.file)) == "text"


def read_shard(shard: Shard, text_format: TextFormat) -> Iterator[Document | BadRecord]:
    """Yield the documents of a shard and its bad records, in order.

    A document's ``line`` counts from the beginning of its shard; a bad record's from that of its file.
    """
    path = as_path(shard.file)
    if shard.stop is not None:
        yield from _read_lines(path, shard.start, shard.stop, text_format)
        return
    if file_format(path) == "text" and text_format.plain_text == "line":  # compressed
        with reading(path), open_stream(path) as stream:
            for number, line in enumerate(stream, start=1):
                result = parse_text_line(line, str(path), number, text_format.encoding)
                if result is not None:
                    yield result
        return
    yield from parse_documents(path, text_format.text_key, text_format.encoding, text_format.keep_fields)


def _shards_of(file: Path, size: int, shard_bytes: int, text_format: TextFormat) -> Iterator[Shard]:
    kind = file_format(file)
    by_line = kind == "jsonl" or (kind == "text" and text_format.plain_text == "line")
    if not by_line or file.suffix in COMPRESSION:
        yield Shard(str(file), 0, None)
        return
    for start in range(0, size, shard_bytes):
        yield Shard(str(file), start, min(size, start + shard_bytes))


def _read_lines(path: Path, start: int, stop: int, text_format: TextFormat) -> Iterator[Document | BadRecord]:
    with open_bytes(path) as stream:
        first = _first_line(stream, start, stop)
        stream.seek(first)
        number, position = 0, first
        while position < stop and (line := stream.readline()):
            number += 1
            position += len(line)
            if file_format(path) == "jsonl":
                result = parse_json_line(
                    line, str(path), number, text_format.text_key, text_format.encoding, text_format.keep_fields
                )
            else:
                result = parse_text_line(line, str(path), number, text_format.encoding)
            if isinstance(result, BadRecord):  # only now is the number of lines before this shard worth counting
                before = _count_lines(path, first)
                result = BadRecord(result.file, before + number, result.reason, result.detail)
            if result is not None:
                yield result


def _first_line(stream: IO[bytes], start: int, stop: int) -> int:
    """Return where the first line begins in ``[start, stop)``, or ``stop``; one that began before is not ours.

    It looks no further than ``stop``, so that a line as long as many shards is not read once for each of them.
    """
    if start == 0:
        return 0
    position = start - 1
    stream.seek(position)
    while position < stop and (block := stream.read(min(_SCAN_BYTES, stop - position))):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return stop


def _count_lines(path: Path, stop: int) -> int:
    count = 0
    with open_bytes(path) as stream:
        while stop and (block := stream.read(min(stop, 1 << 22))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _check_encoding(encoding: str) -> None:
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise InputError(f"encoding {encoding!r} is unknown to Python; name one such as utf-8 or latin-1") from error
    if name.startswith(("utf-16", "utf-32")):
        raise InputError(f"encoding {encoding!r} cannot be cut into lines by bytes; convert the files to utf-8 first")
