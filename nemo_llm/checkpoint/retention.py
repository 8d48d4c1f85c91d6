"""Which checkpoints stay. No torch."""

import json
import shutil
from pathlib import Path

from nemo_llm.checkpoint.folder import find_checkpoints, remove, step_of
from nemo_llm.config.sections.run_services import CheckpointConfig


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
        return json.loads((folder / "training.json").read_text())["validation_loss"]
    except (OSError, ValueError, KeyError):
        return None
