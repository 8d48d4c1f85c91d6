"""Decide what a run starts from: nothing, its own last checkpoint, or one that the user named."""

from pathlib import Path

from nemo_llm.checkpoint.folder import find_checkpoint, resolve_checkpoint
from nemo_llm.log import get_logger
from nemo_llm.training.checkpoint import load_checkpoint
from nemo_llm.training.state import TrainingRun

_log = get_logger(__name__)


def resume(run: TrainingRun) -> None:
    """Load what ``checkpoint.resume`` asks for.

    ``never`` starts anew. ``auto`` goes on from the newest complete checkpoint of an explicitly named ``run.dir``, and
    starts anew where there is none; it never looks at another run. Anything else is a path: a run folder, its
    ``checkpoints/`` or one ``step_*``.

    Raises:
        InputError: a path with no complete checkpoint.
        CheckpointError: a checkpoint that is damaged.
    """
    wanted = run.cfg.checkpoint.resume
    if wanted == "never" or (wanted == "auto" and run.cfg.run.dir is None):
        return
    found = find_checkpoint(run.run_dir) if wanted == "auto" else resolve_checkpoint(Path(wanted))
    if found is None:
        return
    load_checkpoint(run, found)
    _log.info("resumed from %s at step %d", found, run.state.step)
