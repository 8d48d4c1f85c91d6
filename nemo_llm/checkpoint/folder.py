"""A checkpoint folder as files: written aside, committed in one step, found, verified. No torch.

``step_00000010/`` holds ``state/`` (Megatron's distributed checkpoint), ``training.json``, ``config.yaml``,
``tokenizer/``, ``manifest.json`` (size and hash of every file) and, written last, ``COMPLETE``. What conversion makes
has the same form, at step 0 and with weights alone.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nemo_llm.errors import CheckpointError, InputError

SCHEMA = 1
COMPLETE = "COMPLETE"
CONFIG_FILE_NAME = "config.yaml"


def begin(final: Path) -> Path:
    """Make the folder, beside ``final`` and invisible to readers, in which a checkpoint is written."""
    temporary = temporary_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)
    return temporary


def temporary_of(final: Path) -> Path:
    """Where ``final`` is written before it is committed; the same on every rank."""
    return final.with_name(f".{final.name}.tmp")


def commit(temporary: Path, final: Path) -> None:
    """Manifest, fsync, rename, marker: a reader sees the whole checkpoint or none."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (temporary / "manifest.json").write_text(json.dumps({"schema": SCHEMA, "files": entries}, indent=1))
    for path in [*files, temporary / "manifest.json", temporary]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    (final / COMPLETE).touch()
    for path in (final / COMPLETE, final, final.parent):
        _fsync(path)


@contextmanager
def writing(final: Path) -> Iterator[Path]:
    """For one process: a folder to fill, committed as ``final`` at its end, removed when the block raises."""
    temporary = begin(final)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    commit(temporary, final)


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` is one committed checkpoint."""
    return (folder / COMPLETE).exists()


def find_checkpoint(path: Path) -> Path | None:
    """Newest complete checkpoint at ``path``: a run folder, its ``checkpoints/`` or one ``step_*``; None if none."""
    if is_complete(path):
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    complete = [step for step in folder.glob("step_*") if is_complete(step)]
    return max(complete, key=lambda step: int(step.name.removeprefix("step_")), default=None)


def resolve_checkpoint(path: Path) -> Path:
    """As `find_checkpoint`, for a checkpoint that the user named.

    Raises:
        InputError: nothing complete there.
    """
    found = find_checkpoint(path)
    if found is None:
        raise InputError(
            f"checkpoint={path}: no complete checkpoint there. Expected a run folder, its checkpoints/ folder or one "
            "step_* folder that holds a COMPLETE file."
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Configuration saved in a run or checkpoint folder, as nested plain mappings.

    Raises:
        InputError: there is none, or it is no YAML mapping.
    """
    path = folder / CONFIG_FILE_NAME
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected a folder made by nemo_llm.train") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping of sections, received {type(config).__name__}")
    return config


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["schema"] != SCHEMA:
        raise CheckpointError(f"{folder}: schema {manifest['schema']}, this version reads {SCHEMA}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: missing; the manifest lists it with {expected['bytes']} bytes")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: damaged; size or hash differ from the manifest")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
