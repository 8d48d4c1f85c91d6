"""A checkpoint folder as files: written aside, committed in one step, found, kept or removed. No torch.

``step_00000010/`` holds ``state/`` (Megatron's distributed checkpoint), ``training.json``, ``config.yaml``,
``tokenizer/``, ``manifest.json`` (size and hashes of every file) and, written last, ``COMPLETE`` (the manifest's hash).
What conversion makes has the same form, at step 0 and with weights alone.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as _SafeLoader  # twenty times as fast
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

from nemo_llm.checkpoint.manifest import COMPLETE, manifest_digest, verify, write_manifest
from nemo_llm.config.sections.run_services import CheckpointConfig
from nemo_llm.errors import CheckpointDamagedError, CheckpointNotFoundError, CheckpointRefusedError, InputError
from nemo_llm.storage.atomic_files import fsync

__all__ = ["verify"]  # defined beside the manifest; users of a folder look for it here

CONFIG_FILE_NAME = "config.yaml"
TRAINING_FILE_NAME = "training.json"
TOKENIZER_FOLDER_NAME = "tokenizer"
ADAPTER_FILE_NAME = "adapter.json"
"""In checkpoints that hold an adapter alone; nemo_llm.peft.state writes it."""


def require_weights(folder: Path) -> None:
    """Refuse a checkpoint that holds an adapter alone, where weights are asked for.

    Raises:
        CheckpointRefusedError: it does.
    """
    if (folder / ADAPTER_FILE_NAME).exists():
        raise CheckpointRefusedError(
            f"{folder} holds an adapter and not the weights it stands beside.\n      fix: merge them with "
            "tools/peft_adapter.py merge, and name what that writes"
        )


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer of one checkpoint into another; returns whether there is one."""
    if not (source / TOKENIZER_FOLDER_NAME).is_dir():
        return False
    shutil.copytree(source / TOKENIZER_FOLDER_NAME, target / TOKENIZER_FOLDER_NAME)
    return True


def begin(final: Path) -> Path:
    """Make the folder, beside ``final`` and invisible to readers, in which a checkpoint is written."""
    temporary = temporary_of(final)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)
    return temporary


def temporary_of(final: Path) -> Path:
    """Where ``final`` is written before it is committed; the same on every rank."""
    return final.with_name(f".{final.name}.tmp")


def commit(temporary: Path, final: Path, known: dict[str, dict[str, Any]] | None = None) -> None:
    """Manifest, fsync, rename, marker: a reader sees the whole checkpoint or none.

    Args:
        known: manifest entries of files that were hashed, and brought to the disk, while they were written.
    """
    known = known or {}
    files = write_manifest(temporary, known)
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    for path in [path for path in files if str(path.relative_to(temporary)) not in known]:
        fsync(path)
    for folder in [*folders, temporary]:
        fsync(folder)
    remove(final)
    temporary.rename(final)
    fsync(final.parent)
    marker = final / COMPLETE
    marker.write_text(manifest_digest(final) + "\n")
    for path in (marker, final):
        fsync(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint such that a half-deleted one is never taken for a whole one."""
    # By a name that no reader looks at, and that `remove_old` clears away when this process is killed in the middle.
    aside = folder.with_name(f".{folder.name}.gone.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


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


def find_checkpoints(path: Path) -> list[Path]:
    """Complete checkpoints at ``path``, newest first: a run folder, its ``checkpoints/`` or one ``step_*``."""
    if is_complete(path):
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    complete = [step for step in folder.glob("step_*") if step_of(step) is not None and is_complete(step)]
    return sorted(complete, key=lambda step: step_of(step) or 0, reverse=True)


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name says; None for another name."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if folder.name.startswith("step_") and digits.isdecimal() else None


def find_checkpoint(path: Path) -> Path | None:
    """Newest complete checkpoint at ``path``, see `find_checkpoints`; None if there is none."""
    return next(iter(find_checkpoints(path)), None)


def resolve_checkpoint(path: Path) -> Path:
    """As `find_checkpoint`, for a checkpoint that the user named.

    Raises:
        CheckpointNotFoundError: nothing complete there; the message says what is.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointNotFoundError(
            f"checkpoint={path}: no complete checkpoint there. Expected a run folder, its checkpoints/ folder or one "
            f"step_* folder that holds a COMPLETE file; found {_found_instead(path)}."
        )
    return found


def _found_instead(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    if path.is_file():
        return "a file"
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    unfinished = sorted(step.name for step in folder.glob("*step_*"))
    if unfinished:
        return f"{', '.join(unfinished[:5])}, none of them finished (no COMPLETE)"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder with {', '.join(names[:5])}" if names else "an empty folder"


def read_progress(folder: Path) -> dict[str, Any] | None:
    """How far training was: ``training.json``; None where a checkpoint holds weights alone.

    Raises:
        CheckpointDamagedError: the file is not readable.
    """
    path = folder / TRAINING_FILE_NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path}: damaged; not readable ({error})") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Configuration saved in a run or checkpoint folder, as nested plain mappings.

    Raises:
        InputError: there is none, or it is no YAML mapping.
    """
    path = folder / CONFIG_FILE_NAME
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected a folder made by nemo_llm.train") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping of sections, received {type(config).__name__}")
    return config


def remove_old(checkpoints: Path, settings: CheckpointConfig) -> list[Path]:
    """Remove what no rule keeps; returns what was removed. Called when a new checkpoint is complete, which stays.

    Kept are the newest ``keep_last``, each whose step is a multiple of ``keep_every``, and the ``keep_best`` with the
    lowest validation loss. ``keep_last: null`` keeps all. Also what an earlier process left half-written goes.
    """
    for unfinished in checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    folders = find_checkpoints(checkpoints)
    if settings.keep_last is None:
        return []
    keep = set(folders[: settings.keep_last])
    if settings.keep_every is not None:
        keep |= {folder for folder in folders if (step_of(folder) or 0) % settings.keep_every == 0}
    if settings.keep_best is not None:
        losses = {folder: loss for folder in folders if (loss := _validation_loss(folder)) is not None}
        keep |= set(sorted(losses, key=lambda folder: losses[folder])[: settings.keep_best])
    gone = [folder for folder in folders if folder not in keep]
    for folder in gone:
        remove(folder)
    return gone


def _validation_loss(folder: Path) -> float | None:
    try:
        return (read_progress(folder) or {}).get("validation_loss")
    except (OSError, CheckpointDamagedError):
        return None
