"""What indexing will do, written down before it starts: settings, inputs, and the shards that they are cut into.

The plan does not depend on the number of workers, so that an interrupted run can go on with another number.
"""

import codecs
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from nemo_llm.config.data import TokenizerConfig
from nemo_llm.data.documents import (
    BadRecord,
    Document,
    expand_inputs,
    file_format,
    open_stream,
    parse_json_line,
    parse_text_line,
    read_documents,
    reading,
)
from nemo_llm.errors import InputError

_MIN_SHARD_BYTES = 1 << 20
_MAX_SHARD_BYTES = 1 << 24
_SCAN_BYTES = 1 << 18
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """All that decides the ids: two runs with equal settings and inputs write the same files."""

    tokenizer: TokenizerConfig
    text_key: str
    plain_text: str
    encoding: str
    append_eod: bool
    on_bad_record: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of one input file: a whole file, or the lines that begin in ``[start, stop)`` of its bytes."""

    file: str
    start: int
    stop: int | None
    """None: the whole file."""


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """Settings, the state of the inputs, and their shards in order."""

    fingerprint: str
    settings: IndexSettings
    inputs: tuple[tuple[str, int, int], ...]
    """Path, bytes, and time of change in nanoseconds."""
    shards: tuple[Shard, ...]

    def identity(self) -> dict:
        """Return what must agree for an interrupted run to go on, as plain values."""
        settings = asdict(self.settings)
        settings["tokenizer"] = self.fingerprint
        return {"format": 1, "settings": settings, "inputs": [list(entry) for entry in self.inputs]}


def make_plan(inputs: list[str], settings: IndexSettings, fingerprint: str) -> IndexPlan:
    """Return the plan for files, folders and globs; raises InputError for missing files or an encoding unknown here."""
    _check_encoding(settings.encoding)
    files = sorted({file.resolve() for pattern in inputs for file in expand_inputs(pattern)})
    stats = [file.stat() for file in files]
    total = sum(stat.st_size for stat in stats)
    shard_bytes = min(_MAX_SHARD_BYTES, max(_MIN_SHARD_BYTES, total // 64))
    shards = [
        shard
        for file, stat in zip(files, stats, strict=True)
        for shard in _shards_of(file, stat.st_size, shard_bytes, settings)
    ]
    state = tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True))
    return IndexPlan(fingerprint, settings, state, tuple(shards))


def is_stream(shard: Shard, settings: IndexSettings) -> bool:
    """Return whether a shard is one plain text document, to be read as a stream."""
    return shard.stop is None and settings.plain_text == "file" and file_format(Path(shard.file)) == "text"


def read_shard(shard: Shard, settings: IndexSettings) -> Iterator[Document | BadRecord]:
    """Yield the documents of a shard and its bad records, in order."""
    path = Path(shard.file)
    if shard.stop is not None:
        yield from _read_lines(path, shard.start, shard.stop, settings)
        return
    if file_format(path) == "text":  # compressed, a document a line
        with reading(path), open_stream(path) as stream:
            for number, line in enumerate(stream, start=1):
                result = parse_text_line(line, str(path), number, settings.encoding)
                if result is not None:
                    yield result
        return
    bad: list[BadRecord] = []
    for document in read_documents(path, settings.text_key, bad.append, settings.encoding):
        yield from bad
        bad.clear()
        yield document
    yield from bad


def _shards_of(file: Path, size: int, shard_bytes: int, settings: IndexSettings) -> Iterator[Shard]:
    kind = file_format(file)
    by_line = kind == "jsonl" or (kind == "text" and settings.plain_text == "line")
    if not by_line or file.suffix in _COMPRESSED:
        yield Shard(str(file), 0, None)
        return
    for start in range(0, size, shard_bytes):
        yield Shard(str(file), start, min(size, start + shard_bytes))


def _read_lines(path: Path, start: int, stop: int, settings: IndexSettings) -> Iterator[Document | BadRecord]:
    with path.open("rb") as stream:
        first = _first_line(stream, start, stop)
        stream.seek(first)
        number, position = 0, first
        while position < stop and (line := stream.readline()):
            number += 1
            position += len(line)
            if file_format(path) == "jsonl":
                result = parse_json_line(line, str(path), number, settings.text_key, settings.encoding)
            else:
                result = parse_text_line(line, str(path), number, settings.encoding)
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
    with path.open("rb") as stream:
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
