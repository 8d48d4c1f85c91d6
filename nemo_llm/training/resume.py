"""Decide what a run starts from: its own last good checkpoint, one that the user named, weights alone, or nothing."""

from pathlib import Path

import torch
import torch.distributed as dist

from nemo_llm.checkpoint.collective_errors import raise_together
from nemo_llm.checkpoint.folder import (
    CONFIG_FILE_NAME,
    TRAINING_FILE_NAME,
    find_checkpoints,
    is_complete,
    resolve_checkpoint,
    step_of,
)
from nemo_llm.checkpoint.manifest import verify
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.checkpoint.weights import load_weights
from nemo_llm.config import RunConfig
from nemo_llm.errors import CheckpointDamagedError
from nemo_llm.log import get_logger
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.training.checkpoint import load_checkpoint, progress_of
from nemo_llm.training.state import TrainingRun

_log = get_logger(__name__)


def resume(run: TrainingRun) -> None:
    """Load what ``checkpoint.resume`` asks for; a run that starts anew takes weights from ``checkpoint.init_from``.

    ``never`` starts anew. ``auto`` goes on from the newest good checkpoint of an explicitly named ``run.dir``, and
    starts anew where there is none; it never looks at another run. Anything else is a path: a run folder, its
    ``checkpoints/`` or one ``step_*``.

    Raises:
        CheckpointNotFoundError: a path with no complete checkpoint.
        CheckpointDamagedError: no checkpoint is whole, or the one ``step_*`` that was named is not.
    """
    wanted = run.cfg.checkpoint.resume
    candidates: list[Path] = []
    if wanted == "auto" and run.cfg.run.dir is not None:
        candidates = find_checkpoints(run.run_dir)
    elif wanted not in ("auto", "never"):
        newest = resolve_checkpoint(Path(wanted))
        candidates = [newest] if is_complete(Path(wanted)) else find_checkpoints(Path(wanted))
    if candidates:
        found = newest_good(run.cfg, run.runtime, candidates)
        load_checkpoint(run, found)
        if run.runtime.is_first_rank:
            _set_aside_later(run, found)
        _log.info("resumed from %s at step %d", found, run.state.step)
    elif run.cfg.checkpoint.init_from is not None and run.cfg.peft is None:
        load_first_weights(run.cfg, run.runtime, run.model)
        # The optimizer keeps copies (fp32, sharded) of the weights that it was built with.
        run.optimizer.reload_model_params()


def newest_good(cfg: RunConfig, runtime: ParallelRuntime, candidates: list[Path]) -> Path:
    """The first of ``candidates`` whose files are as they were written; all ranks share the reading.

    Raises:
        CheckpointDamagedError: none is.
        InputError: a newer version wrote it.
    """
    # What the first rank sees counts: other nodes may see a folder that has just been made a moment later.
    agreed: list[list[Path]] = [candidates]
    dist.broadcast_object_list(agreed, src=0)
    damage: list[str] = []
    for folder in agreed[0]:
        try:
            with raise_together():
                verify(folder, cfg.checkpoint.verify, (runtime.rank, runtime.world_size))
                _check_step(folder)
                if (folder / CONFIG_FILE_NAME).is_file():  # bare weights have none
                    SavedRun.at(folder)
        except CheckpointDamagedError as error:
            damage.append(str(error))
            continue
        for text in damage:
            _log.warning("passed over: %s", text)
        return folder
    raise CheckpointDamagedError("no checkpoint to resume from is whole:\n  " + "\n  ".join(damage))


def _check_step(folder: Path) -> None:
    """Refuse a folder whose name says another step than it holds: what is saved from there on would seem older."""
    named = step_of(folder)
    if named is None or not (folder / TRAINING_FILE_NAME).exists():
        return
    held = progress_of(folder)["step"]
    if held != named:
        raise CheckpointDamagedError(
            f"{folder}: it holds step {held}, and its name says step {named}; rename it step_{held:08d}, or remove it"
        )


def _set_aside_later(run: TrainingRun, found: Path) -> None:
    """Rename this run's checkpoints beyond ``found``: damaged, or of a future that will now be written anew."""
    if found.parent != run.run_dir / "checkpoints":
        return
    for later in find_checkpoints(run.run_dir):
        if later == found:
            break
        number = 1
        while (aside := later.with_name(f"set_aside_{number}_{later.name}")).exists():
            number += 1
        later.rename(aside)
        _log.warning("%s is kept as %s, since the run goes on from %s", later, aside.name, found.name)


def load_first_weights(cfg: RunConfig, runtime: ParallelRuntime, chunks: list[torch.nn.Module]) -> None:
    """Read the weights that ``checkpoint.init_from`` names into the chunks; a collective of all ranks."""
    assert cfg.checkpoint.init_from is not None
    folder = newest_good(cfg, runtime, [resolve_checkpoint(Path(cfg.checkpoint.init_from))])
    load_weights(chunks, folder, new_head=True)
    _log.info("weights from %s", folder)
