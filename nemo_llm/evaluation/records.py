"""Records of evaluation files: JSON lines, Parquet or CSV, each with the line on which it stands."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_llm.corpus.documents import COMPRESSION, open_stream, reading
from nemo_llm.corpus.documents import read_records as read_objects
from nemo_llm.errors import InputError

_MOST_CELL_CHARACTERS = 1 << 30


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record) of a ``.csv``, JSON-lines or Parquet file, compressed or not.

    Args:
        columns: names of a CSV's columns, for files that may lack a header of their own.

    Raises:
        InputError: no such file, or a line that cannot be read.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    yield from _csv_records(path, columns) if _ending(path) == ".csv" else read_objects(path)


def is_table(path: Path) -> bool:
    """Whether a file's name says that it holds records."""
    return _ending(path) in (".jsonl", ".csv", ".parquet")


def _ending(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix


def _csv_records(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_MOST_CELL_CHARACTERS)
    names = None if columns is None else list(columns)
    with reading(path), open_stream(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if names is None:
                    names = row
                    continue
                if columns is not None and [cell.strip().lower() for cell in row] == [name.lower() for name in columns]:
                    continue  # the header
                if not row:
                    continue
                if len(row) != len(names):
                    wanted = f"expected {len(names)} ({', '.join(names)})"
                    raise InputError(f"{path}, line {reader.line_num}: {len(row)} columns, {wanted}")
                yield reader.line_num, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from None
