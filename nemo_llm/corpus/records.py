"""Records, which are mappings: JSON lines, Parquet and CSV, by one reader for chats, labels, tasks and examples."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_llm.corpus.documents import (
    BadRecord,
    BadRecordError,
    ending,
    expand_inputs,
    file_format,
    lone_surrogate,
    open_stream,
    parquet_rows,
    parse_json,
    reading,
)
from nemo_llm.errors import InputError

_RECORDS = (".jsonl", ".ndjson", ".csv", ".parquet")
_MOST_CELL_CHARACTERS = 1 << 30


def find_record_files(pattern: str) -> list[Path]:
    """`expand_inputs`, of several files those that hold records by their names (not ``.json``, which describes data).

    Raises:
        InputError: there is none.
    """
    files = expand_inputs(pattern)
    found = files if len(files) == 1 else [file for file in files if ending(file) in _RECORDS]
    if not found:
        raise InputError(f"{pattern}: has no {', '.join(_RECORDS)} file")
    return found


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row from 1, record) of a JSON-lines, Parquet or CSV file, compressed or not.

    Parquet's nulls are left out at every depth.

    Args:
        columns: names of a CSV's columns, for files that may lack a header of their own.

    Raises:
        InputError: a line that holds no record, or a file that cannot be read.
    """
    with reading(path):
        if ending(path) == ".csv":
            yield from _csv_records(path, columns)
            return
        if file_format(path) == "parquet":
            yield from enumerate(map(_without_nulls, parquet_rows(path)), start=1)
            return
        with open_stream(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                record = parse_json(line, str(path), number, "utf-8")
                if number == 1 and (isinstance(record, list) or line.strip() == b"["):
                    fix = f"write one JSON object a line: jq -c '.[]' {path.name} > {path.stem}.jsonl"
                    raise InputError(f"{path}:1: the file holds a JSON array\n      fix: {fix}")
                if isinstance(record, BadRecord):
                    raise BadRecordError(record)
                if not isinstance(record, dict):
                    kind = type(record).__name__
                    raise InputError(f"{path}:{number}: a line must hold one JSON object, received a {kind}")
                if b"\\u" in line and (place := lone_surrogate(json.dumps(record, ensure_ascii=False))) is not None:
                    detail = "half of a surrogate pair, which is no character"
                    raise BadRecordError(BadRecord(str(path), number, "lone surrogate", f"{detail} (near {place})"))
                yield number, record


def read_all_records(
    files: Iterable[Path], columns: Sequence[str] | None = None
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (file, line, record) of several files, as `read_records` reads each."""
    for file in files:
        yield from ((file, line, record) for line, record in read_records(file, columns))


def text_of(record: Mapping[str, Any], key: str) -> str:
    """A field of a record as text, numbers and true and false as JSON spells them.

    Raises:
        InputError: no such field, or one without a value (null), or a list or mapping.
    """
    value = record.get(key)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    if value is None:
        what = "holds null" if key in record else f"is missing; the record has {', '.join(map(str, record))}"
        raise InputError(f"the field {key!r} {what}")
    raise InputError(f"the field {key!r} holds a {type(value).__name__}, and text, number, true or false is needed")


def _csv_records(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_MOST_CELL_CHARACTERS)
    with open_stream(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            names = columns or next(reader, [])
            for row in reader:
                if not row or [cell.strip().lower() for cell in row] == [name.lower() for name in columns or ()]:
                    continue  # a blank line, or the header
                if len(row) != len(names):
                    wanted = f"expected {len(names)} ({', '.join(names)})"
                    raise InputError(f"{path}, line {reader.line_num}: {len(row)} columns, {wanted}")
                yield reader.line_num, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from None


def _without_nulls(value: Any) -> Any:
    """A copy without the fields that a Parquet file gives to every record and this one left empty."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
