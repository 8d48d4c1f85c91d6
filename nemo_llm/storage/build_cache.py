"""The data cache: what was built once from text, and checks already made. Content-addressed, built under a lock.

Each entry is a folder named by a hash of everything that it depends on. It is built in a temporary folder beside it and
appears by one rename; its manifest holds the size and SHA-256 of every file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from nemo_llm.errors import InputError
from nemo_llm.storage.atomic_files import UNFINISHED, write_json
from nemo_llm.storage.locks import build_lock

MANIFEST = "manifest.json"


def cache_folder(configured: str | None) -> Path:
    """Return the cache folder: the configured one, else ``$NEMO_LLM_CACHE``, else ``~/.cache/nemo_llm``."""
    if configured is not None:
        return Path(configured).expanduser()
    from_environment = os.environ.get("NEMO_LLM_CACHE")
    return Path(from_environment).expanduser() if from_environment else Path.home() / ".cache" / "nemo_llm"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_key(**parts: object) -> str:
    """Return a short hash of named values (anything that JSON holds)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def build_once(folder: Path, build: Callable[[Path], dict]) -> dict:
    """Return the manifest of a cache entry, building it first if it is absent or damaged.

    ``build(temporary_folder)`` writes the entry's files and returns facts for the manifest. One process builds; others
    that come meanwhile, on this node or another, wait and then open the same entry. A builder that dies leaves only a
    temporary folder, which the next one removes. Raises InputError when the cache cannot be written.
    """
    manifest = _verified(folder)
    if manifest is not None:
        return manifest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with build_lock(folder.with_name(folder.name + ".lock")):
            manifest = _verified(folder)
            return manifest if manifest is not None else _build(folder, build)
    except OSError as error:
        raise InputError(
            f"{folder}: the data cache cannot be written ({error}); set data.cache_dir or NEMO_LLM_CACHE to a folder "
            "with free space that this user may write"
        ) from error


def _build(folder: Path, build: Callable[[Path], dict]) -> dict:
    for left_over in folder.parent.glob(f"{folder.name}{UNFINISHED}*"):  # of builders that died: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    if folder.exists():  # damaged, or it would not have come to this
        shutil.rmtree(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}{UNFINISHED}", dir=folder.parent))
    try:
        facts = build(temporary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = {"format": 1, "files": files, **facts}
        write_json(temporary / MANIFEST, manifest)
        temporary.chmod(0o755)  # mkdtemp makes it private, but a cache is for all users who can reach it
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _verified(folder: Path) -> dict | None:
    """Return the manifest if every file is there with its recorded size, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items()):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
