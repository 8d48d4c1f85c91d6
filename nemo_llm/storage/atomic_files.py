"""Small files that survive a crash: either the old content or the new one, never half of it."""

import errno
import os
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Make `text` the content of `path` in one step: a temporary file beside it, fsync, rename, fsync of the folder.

    A process killed at any moment leaves the old file or the new one. A failed write leaves no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


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
