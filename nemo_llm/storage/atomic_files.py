"""Files that survive a crash: either the old content or the new one, never half of it."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemo_llm.errors import InputError

UNFINISHED = ".tmp-"
"""In the name of every file that is still being written; one that stays behind is of a process that was killed."""


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A file to fill, which becomes `path` at the end of the block: written beside it, fsync, rename, fsync of folder.

    A process killed at any moment leaves the old file or the new one. A block that raises leaves no temporary file.

    Args:
        sync: False where the file may be lost with the machine, since another is made of it that is synced.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                sync_stream(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        fsync(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Make `text` the content of `path` in one step, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Make `value` the content of `path` as JSON, see `replacing`."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_output(key: str, path: Path, text: str) -> None:
    """Write a result to the file that the user named with ``key=path``; the folder is made where it is missing.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{key}={path}: cannot be written ({error.strerror or error})") from None


def sync_stream(file: IO[bytes]) -> None:
    """Bring all that was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Bring a file, or the entries of a folder where its file system can do that, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse it on a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
