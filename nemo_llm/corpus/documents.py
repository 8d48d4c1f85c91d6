"""Reading documents from text files: plain text, JSON lines, Parquet; plain or gz, bz2, xz, zst.

A plain text file is one document; a JSON line is one document; a Parquet row is one document. Everything streams but
a plain text file. What cannot be read is reported as a ``BadRecord`` naming file and line, never silently skipped.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from nemo_llm.assets import ASSET_PREFIX, resolve_path
from nemo_llm.errors import InputError

COMPRESSION = (".gz", ".bz2", ".xz", ".zst")
_BLOCK_BYTES = 1 << 20
_JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class Document:
    """One document and where it stood: ``line`` counts from 1 (Parquet: the row)."""

    text: str
    file: str
    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields that were asked for, where the record has them."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not become a document."""

    file: str
    line: int
    reason: str
    """A short fixed phrase to count by, such as ``malformed JSON``."""
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


class BadRecordError(InputError):
    """A bad record where none is tolerated."""

    def __init__(self, record: BadRecord) -> None:
        super().__init__(str(record))
        self.record = record


OnBad = Callable[[BadRecord], None]


def raise_bad(record: BadRecord) -> None:
    """An ``OnBad`` that stops at the first bad record with an InputError."""
    raise BadRecordError(record)


def check_bad_share(bad: Mapping[str, int], good: int, allowed: float, examples: Iterable[str]) -> None:
    """Refuse to go on where a larger share than allowed of the records is bad, or none is good.

    Args:
        bad: numbers by reason.
        examples: the first bad ones; read only where they are shown.

    Raises:
        InputError: with the reasons and the examples.
    """
    number = sum(bad.values())
    if number > allowed * (number + good):
        counts = ", ".join(f"{count} x {reason}" for reason, count in bad.items())
        raise InputError(
            f"{number} of {number + good} records are bad ({counts}), more than max_bad_fraction = {allowed}; nothing "
            f"is published. The first: {'; '.join(examples)}. Mend them, or raise max_bad_fraction and run again (what "
            "is done is kept)"
        )
    if not good:
        raise InputError("the inputs hold no document")


def as_path(name: str) -> Path:
    """Return a local path, or one in object storage for a URL such as ``s3://bucket/folder``, by fsspec's file systems.

    Raises:
        InputError: what reads such URLs is not installed, or the URL is malformed.
    """
    if "://" not in name:
        return Path(name).expanduser()
    try:
        from upath import UPath

        path = UPath(name)
        _ = path.fs  # imports what the protocol needs
    except ImportError as error:
        raise InputError(f"{name}: {error}\n      fix: pip install 'nemo_llm[storage]'") from error
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    return cast(Path, path)  # it has what is used of a Path here


def expand_inputs(pattern: str) -> list[Path]:
    """Return the files that a path, a folder (all files below it) or a glob names, sorted; InputError if none.

    All of them may be URLs of object storage (`as_path`); ``asset:NAME`` is a shipped text.
    """
    if pattern.startswith(ASSET_PREFIX):
        return [resolve_path(pattern, "text")]
    path = as_path(pattern)
    try:
        files = _find_files(path, pattern)
    except OSError as error:
        raise InputError(f"{pattern}: cannot be listed ({error})") from error
    except Exception as error:  # clients of object storage have exceptions of their own, for missing credentials say
        if isinstance(path, Path):
            raise
        raise InputError(f"{pattern}: cannot be listed ({type(error).__name__}: {error})") from error
    if not files:
        raise InputError(f"{pattern}: no such file, and no file matches it as a pattern")
    return files


def _find_files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found: Iterable[Path] = path.rglob("*")
    elif isinstance(path, Path):
        found = map(Path, glob.glob(str(path), recursive=True))
    else:
        wild = re.search(r"[*?\[]", pattern)
        folder = pattern[: wild.start()].rpartition("/")[0] if wild else pattern
        found = as_path(folder).glob(pattern[len(folder) + 1 :]) if wild else ()
    return sorted((file for file in found if file.is_file()), key=str)


def file_state(path: Path) -> tuple[int, int]:
    """Bytes, and time of change in nanoseconds (0 where the storage tells none)."""
    if not isinstance(path, Path):
        path.fs.invalidate_cache()
    stat = path.stat()
    return stat.st_size, round(stat.st_mtime * 1e9) if not isinstance(path, Path) else stat.st_mtime_ns


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file as it is, local or in object storage, for reading lines and seeking."""
    stream = path.open("rb")
    return stream if isinstance(path, Path) else io.BufferedReader(stream, _BLOCK_BYTES)


def file_format(path: Path) -> str:
    """Return ``jsonl``, ``parquet`` or ``text`` by the name's ending, a compression's ending aside."""
    found = ending(path)
    return "jsonl" if found in _JSON_LINES else "parquet" if found == ".parquet" else "text"


def ending(path: Path) -> str:
    """The ending of a file's name, a compression's aside."""
    return (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix


def open_stream(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressed by its ending."""
    match path.suffix:
        case ".gz":
            return gzip.open(open_bytes(path), "rb")  # type: ignore[return-value]
        case ".bz2":
            return bz2.open(open_bytes(path), "rb")
        case ".xz":
            return lzma.open(open_bytes(path), "rb")
        case ".zst":
            return io.BufferedReader(_ZstdFile(path), _BLOCK_BYTES)
    return open_bytes(path)


class _ZstdFile(io.RawIOBase):
    """Reads the frames of a .zst file; unlike the library's own reader, it notices a file that ends too early."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._file = open_bytes(path)
        self._ready = b""
        self._in_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = self._new_frame(), False
            block = block or self._file.read(_BLOCK_BYTES)
            if not block:
                if self._in_frame:
                    raise EOFError("the compressed stream is cut off")
                return 0
            self._in_frame = True
            self._ready = self._frame.decompress(block)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged or unreadable file raises into an InputError that names it."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
    if path.suffix == ".zst":
        import zstandard

        errors += (zstandard.ZstdError,)
    try:
        yield
    except errors as error:
        raise InputError(f"{path}: cannot be read to its end ({error})") from error


def read_documents(
    path: Path, text_key: str, on_bad: OnBad = raise_bad, encoding: str = "utf-8", keep: tuple[str, ...] = ()
) -> Iterator[Document]:
    """Yield the documents of one file in order; records that cannot be read go to ``on_bad``.

    ``keep`` names other fields (JSON lines) or columns (Parquet) to carry along.

    Raises InputError when the file itself cannot be read (a broken compressed stream, not a Parquet file).
    """
    for result in parse_documents(path, text_key, encoding, keep):
        if isinstance(result, BadRecord):
            on_bad(result)
        else:
            yield result


def parse_documents(
    path: Path, text_key: str, encoding: str = "utf-8", keep: tuple[str, ...] = ()
) -> Iterator[Document | BadRecord]:
    """As `read_documents`, with the records that cannot be read where they stand."""
    with reading(path):
        match file_format(path):
            case "jsonl":
                with open_stream(path) as stream:
                    for number, line in enumerate(stream, start=1):
                        if result := parse_json_line(line, str(path), number, text_key, encoding, keep):
                            yield result
            case "parquet":
                for number, row in enumerate(parquet_rows(path, text_key, keep), start=1):
                    text = row.pop(text_key)
                    if isinstance(text, str):
                        yield _checked(text, str(path), number, row)
                    else:
                        detail = f"{text_key!r} holds {text!r:.40}"
                        yield BadRecord(str(path), number, "field is not text", detail)
            case _:
                try:
                    yield _checked("".join(plain_text_blocks(path, encoding)), str(path), 1)
                except BadRecordError as error:
                    yield error.record


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a plain text file, blank lines left out; a line ends at a line feed alone.

    Raises:
        InputError: bytes that are no UTF-8, or a file that cannot be read.
    """
    with reading(path), open_stream(path) as stream:
        for number, line in enumerate(stream, start=1):
            result = parse_text_line(line, str(path), number, "utf-8")
            if isinstance(result, BadRecord):
                raise BadRecordError(result)
            if result is not None:
                yield number, result.text


def parse_json(line: bytes, file: str, number: int, encoding: str) -> Any:
    """The value on a JSON line, or a `BadRecord`."""
    try:
        return json.loads(line.decode(encoding).removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return BadRecord(file, number, _invalid(encoding), f"{error.reason} at byte {error.start} of the line")
    except ValueError as error:
        return BadRecord(file, number, "malformed JSON", str(error))
    except RecursionError:
        return BadRecord(file, number, "malformed JSON", "nested too deep")


def parse_json_line(
    line: bytes, file: str, number: int, text_key: str, encoding: str = "utf-8", keep: tuple[str, ...] = ()
) -> Document | BadRecord | None:
    """Return the document on a JSON line, what is wrong with it, or None for a blank line."""
    if not line.strip():
        return None
    record = parse_json(line, file, number, encoding)
    if isinstance(record, BadRecord):
        return record
    if not isinstance(record, dict) or text_key not in record:
        known = ", ".join(sorted(record)[:10]) if isinstance(record, dict) else type(record).__name__
        return BadRecord(file, number, "missing field", f"no {text_key!r}, the line has: {known} (text_key)")
    text = record[text_key]
    if not isinstance(text, str):
        return BadRecord(file, number, "field is not text", f"{text_key!r} holds {type(text).__name__}")
    return _checked(text, file, number, {name: record[name] for name in keep if name in record})


def parse_text_line(line: bytes, file: str, number: int, encoding: str) -> Document | BadRecord | None:
    """Return a line of plain text as a document, what is wrong with it, or None for a blank line."""
    try:
        text = line.decode(encoding).removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return BadRecord(file, number, _invalid(encoding), f"{error.reason} at byte {error.start} of the line")
    return _checked(text, file, number) if text.strip() else None


def _invalid(encoding: str) -> str:
    return f"invalid {encoding.upper()}"


def _checked(text: str, file: str, number: int, fields: dict[str, Any] | None = None) -> Document | BadRecord:
    if not text:
        return BadRecord(file, number, "empty document", "no text")
    if (place := lone_surrogate(text)) is not None:
        return BadRecord(file, number, "invalid UTF-8", f"lone surrogate at character {place}")
    return Document(text, file, number, fields or {})


def lone_surrogate(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which JSON may hold and which is no character; None for nowhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def parquet_rows(path: Path, needed: str | None = None, keep: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file: all columns, or the ``needed`` one and those of ``keep`` that there are.

    Raises:
        InputError: no such column, or no Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_bytes(path) as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
            known = parquet.schema_arrow.names
            if needed is not None and needed not in known:
                raise InputError(f"{path}: no column {needed!r}, it has {', '.join(known)}")
            columns = None if needed is None else [needed, *(name for name in keep if name in known)]
            for batch in parquet.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


def plain_text_blocks(path: Path, encoding: str) -> Iterator[str]:
    """Yield the text of a plain text file block by block; BadRecordError names the line of a wrong byte."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
    lines, position = 1, 0
    with reading(path), open_stream(path) as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + error.object.count(b"\n", 0, error.start)
                detail = f"{error.reason} near byte {position + error.start} of the file"
                raise BadRecordError(BadRecord(str(path), line, _invalid(encoding), detail)) from error
            if text:
                yield text
            if not block:
                return
            lines += block.count(b"\n")
            position += len(block)
