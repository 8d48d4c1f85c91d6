"""Files of large corpora and object storage, brought here through fsspec: resumable, checked by size, never half there.

``https://``, ``hf://datasets/...``, ``s3://``, ``gs://`` and whatever else fsspec has a package for. A file is written
to ``NAME.part`` and renamed when it is whole; an interrupted one goes on where it stands, unless the file at its source
has changed since.
"""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm.errors import InputError
from nemo_llm.storage.atomic_files import sync_stream, write_json

_BLOCK_BYTES = 1 << 24
_ATTEMPTS = 6
_THREADS = 8


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at its source."""

    system: Any
    """fsspec's file system."""
    path: str
    size: int
    version: str
    """Changes with the file, as far as its source tells."""


OnProgress = Callable[[int, int], None]


def is_remote(pattern: str) -> bool:
    """Return whether an input is an address, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", pattern) is not None


def fetch_inputs(patterns: list[str], folder: Path, max_files: int | None, on_progress: OnProgress) -> list[str]:
    """Return the patterns with every address replaced by the files that it names, downloaded to ``folder``.

    ``max_files`` takes only the first so many of each address. Raises InputError for an address that names nothing, a
    source that cannot be reached, or a package that is missing.
    """
    local: list[str] = [pattern for pattern in patterns if not is_remote(pattern)]
    files = [file for pattern in patterns if is_remote(pattern) for file in _find(pattern)[:max_files]]
    with ThreadPoolExecutor(_THREADS) as pool:
        places = {file.path: _place(folder, file) for file in files}
        running = [pool.submit(_download, file, places[file.path]) for file in files]
        try:
            for done, future in enumerate(as_completed(running), start=1):
                future.result()
                on_progress(done, len(files))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [*local, *(str(place) for place in places.values())]


def _find(pattern: str) -> list[RemoteFile]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        paths = sorted(system.glob(path)) if any(mark in path for mark in "*?[") else [path]
        found = []
        for each in paths:
            facts = system.info(each)
            if facts["type"] == "file":
                if facts["size"] is None:
                    raise InputError(f"{each}: its source does not tell how long it is; download it by other means")
                version = {name: str(facts[name]) for name in _VERSION_KEYS if facts.get(name) is not None}
                found.append(RemoteFile(system, each, facts["size"], json.dumps(version)))
    except ImportError as error:
        raise InputError(f"{pattern}: {error}; pip install s3fs for s3://, gcsfs for gs://") from error
    except InputError:
        raise
    except Exception as error:  # every source's package has errors of its own
        raise InputError(f"{pattern}: cannot be listed ({type(error).__name__}: {error})") from error
    if not found:
        raise InputError(f"{pattern}: names no file")
    return found


# What sources tell of a file's content, under the names that fsspec's file systems have for it.
_VERSION_KEYS = ("size", "ETag", "etag", "mtime", "last_modified", "LastModified", "md5Hash", "blob_id")


def _place(folder: Path, file: RemoteFile) -> Path:
    """The path at the source, below ``folder``, so that two files never share a place."""
    parts = [part for part in re.sub(r"^[A-Za-z0-9+.-]+://", "", file.path).split("/") if part not in ("", ".", "..")]
    return folder.joinpath(*parts)


def _download(file: RemoteFile, place: Path) -> None:
    note = place.with_name(f".{place.name}.source.json")
    part = place.with_name(f"{place.name}.part")
    place.parent.mkdir(parents=True, exist_ok=True)
    known = note.exists() and json.loads(note.read_text(encoding="utf-8"))["version"] == file.version
    if known and place.exists() and place.stat().st_size == file.size:
        return
    if not known:
        part.unlink(missing_ok=True)
        place.unlink(missing_ok=True)
        write_json(note, {"source": file.path, "version": file.version})
    for attempt in range(_ATTEMPTS):
        try:
            _append(file, part)
            break
        except Exception as error:  # every source's package has errors of its own
            if attempt + 1 == _ATTEMPTS:
                raise InputError(
                    f"{file.path}: the download broke off {_ATTEMPTS} times ({type(error).__name__}: {error}); what is "
                    "there is kept: run the same command again"
                ) from error
            time.sleep(min(30.0, 0.5 * 2**attempt))
    part.replace(place)


def _append(file: RemoteFile, part: Path) -> None:
    """Bring what is missing of a file; OSError when less came than should."""
    with part.open("ab") as stream:
        if stream.tell() > file.size:
            stream.truncate(0)
        if stream.tell() < file.size:
            with file.system.open(file.path, "rb", cache_type="none") as source:
                try:
                    source.seek(stream.tell())
                except ValueError:  # a web server that gives whole files only
                    stream.truncate(0)
                while block := source.read(_BLOCK_BYTES):
                    stream.write(block)
        sync_stream(stream)
        if stream.tell() != file.size:
            raise OSError(f"{stream.tell()} bytes of {file.size}")
