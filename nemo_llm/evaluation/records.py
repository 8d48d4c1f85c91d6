"""Records of evaluation files: JSON lines or CSV, each with the line on which it stands."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_llm.errors import InputError


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record) of a ``.csv`` or JSON-lines file.

    Args:
        columns: names of a CSV's columns, for files that may lack a header of their own.

    Raises:
        InputError: no such file, or a line that cannot be read.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        yield from _csv_records(path, columns) if path.suffix == ".csv" else _json_records(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from None


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: no JSON ({error}); received {line[:80]!r}") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object, received {line[:80]!r}")
            yield number, record


def _csv_records(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        names = None if columns is None else list(columns)
        for row in reader:
            if names is None:
                names = row
                continue
            if columns is not None and [cell.strip().lower() for cell in row] == [name.lower() for name in columns]:
                continue  # the header
            if not row:
                continue
            if len(row) != len(names):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(row)} columns, expected {len(names)} ({', '.join(names)})"
                )
            yield reader.line_num, dict(zip(names, row, strict=True))
