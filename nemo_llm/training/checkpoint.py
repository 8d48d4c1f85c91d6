"""Save and load a run in Megatron's layout-free ``torch_dist`` format; `nemo_llm.checkpoint.folder` shows the files.

A save has three parts. On the main threads of all ranks: agree on who writes what, and start copying to host memory.
In a thread of each rank: write and hash. In the first rank's thread: manifest, rename, marker, retention. With
``checkpoint.async_save`` training goes on after the first.
"""

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica

from nemo_llm.checkpoint.collective_errors import raise_together
from nemo_llm.checkpoint.folder import (
    CONFIG_FILE_NAME,
    TOKENIZER_FOLDER_NAME,
    TRAINING_FILE_NAME,
    begin,
    commit,
    is_complete,
    read_progress,
    remove_old,
    temporary_of,
)
from nemo_llm.checkpoint.optimizer_state import apply_optimizer_scalars, optimizer_scalars, optimizer_tensors
from nemo_llm.checkpoint.safe_load import load_sharded
from nemo_llm.checkpoint.saved_run import TEMPLATE_FILE_NAME
from nemo_llm.checkpoint.weights import apply_model_state, check_same_tensors, model_state
from nemo_llm.checkpoint.writer import StateWriter, WritePlan
from nemo_llm.conversation.template import save_template
from nemo_llm.errors import CheckpointError, CheckpointRefusedError, ConfigError, Problem
from nemo_llm.log import get_logger
from nemo_llm.peft.adapter import adapter_state
from nemo_llm.peft.state import apply_adapter_state, check_base, write_description
from nemo_llm.training.state import TrainingRun, TrainState

_log = get_logger(__name__)


class CheckpointSaver:
    """Saves one run, one checkpoint at a time. `save` and `wait` are collectives of all ranks."""

    def __init__(self, run: TrainingRun) -> None:
        self.writer = StateWriter(run.runtime.groups.dp_cp, run.cfg.checkpoint.writer_threads)
        self.stall_seconds = 0.0
        """Time that the last save kept training waiting, without the copy that overlaps with the next step."""
        self._plan: WritePlan | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, run: TrainingRun, in_background: bool) -> Path:
        """Write the present state under ``run.run_dir``; returns the folder.

        Raises:
            CheckpointError: this save, or the one in the background before it, could not be written.
        """
        began = time.perf_counter()
        self.wait()
        final = run.run_dir / "checkpoints" / f"step_{run.state.step:08d}"
        exists = [is_complete(final)]
        dist.broadcast_object_list(exists, src=0)
        if exists[0]:
            return final
        _finish_parameter_gathering(run)
        state = sharded_state(run)
        needed = _bytes_to_write(state, run.runtime.device)
        temporary = temporary_of(final)
        with raise_together():
            if run.runtime.is_first_rank:
                _prepare(run, final, needed)
        self._plan = self.writer.begin(state, temporary / "state", copy=in_background)
        arguments = (self._plan, temporary, final, run if run.runtime.is_first_rank else None)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not in_background:
            self.wait()
        self.stall_seconds = time.perf_counter() - began
        return final

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part."""
        return self._thread is not None and self._thread.is_alive()

    def copied(self) -> None:
        """Called before weights change: the device first finishes copying the old ones. Costs the host nothing."""
        if self._plan is not None and self._plan.snapshot is not None:
            self._plan.snapshot.wait_on_device()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            CheckpointError: it could not be written; what was written of it is removed.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, self._plan = None, None
        error, self._error = self._error, None
        with raise_together():
            if error is not None:
                raise CheckpointError(f"a checkpoint could not be written: {error}") from error

    def _write(self, plan: WritePlan, temporary: Path, final: Path, run: TrainingRun | None) -> None:
        try:
            plan.write()
            if run is not None:
                commit(temporary, final, plan.collect())
                remove_old(final.parent, run.cfg.checkpoint)
        except Exception as error:
            self._error = error
            shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(run: TrainingRun, in_background: bool = False) -> Path:
    """Write the present state under ``run.run_dir``; the folder is complete on return, unless ``in_background``."""
    if run.saver is None:
        run.saver = CheckpointSaver(run)
    return run.saver.save(run, in_background)


def finish_saving(run: TrainingRun) -> None:
    """Wait for a save in the background."""
    if run.saver is not None:
        run.saver.wait()


def sharded_state(run: TrainingRun) -> dict:
    """Model and optimizer as Megatron's sharded state dict: names and global offsets, no layout."""
    model = trained_state(run)
    tensors = optimizer_tensors(run.optimizer, model)
    return {
        **model,
        "optimizer": {str(number): tensor for number, tensor in enumerate(tensors)},
        "optimizer_scalars": optimizer_scalars(run.optimizer),
    }


def trained_state(run: TrainingRun) -> dict:
    """What a checkpoint holds of the model: all weights, or the adapters alone where the rest is frozen."""
    return model_state(run.model) if run.cfg.peft is None else {"adapter": adapter_state(run.model)}


def load_checkpoint(run: TrainingRun, folder: Path) -> None:
    """Read ``folder``, which was verified before, into the run, whatever layout wrote it.

    Raises:
        CheckpointRefusedError: it holds another model, or weights alone.
    """
    state = sharded_state(run)
    del state["optimizer_scalars"]
    with raise_together():
        if run.cfg.peft is not None:
            check_base(folder, run.base_fingerprint)
        check_same_tensors(trained_state(run), folder)
        progress = progress_of(folder)
        _check_chat_template(run, progress, folder)
        _check_has_optimizer(state, folder)
    loaded = load_sharded(state, folder / "state", validate_access_integrity=False)
    if run.cfg.peft is None:
        apply_model_state(run.model, loaded)
    else:
        apply_adapter_state(run.model, loaded["adapter"])
    apply_optimizer_scalars(run.optimizer, loaded["optimizer_scalars"])
    saved = TrainState(
        progress["step"],
        progress["consumed_samples"],
        progress["consumed_tokens"],
        [tuple(row) for row in progress.get("recent", [])],
        progress.get("validation_loss"),
    )
    vars(run.state).update(vars(saved))  # in place: the loop holds the object


def progress_of(folder: Path) -> dict[str, Any]:
    """As `read_progress`, of a checkpoint to resume from.

    Raises:
        CheckpointRefusedError: it holds weights alone, as a converted one does.
    """
    progress = read_progress(folder)
    if progress is None:
        raise CheckpointRefusedError(
            f"{folder} holds weights and no training state (no {TRAINING_FILE_NAME}), so that nothing can be resumed "
            f"from it.\n      fix: start from its weights with checkpoint.init_from={folder}"
        )
    return progress


def _check_chat_template(run: TrainingRun, progress: dict[str, Any], folder: Path) -> None:
    """Refuse another chat template than the one of the run's earlier steps. (Checkpoints of old do not name theirs.)"""
    present = _template_digest(run)
    saved = progress.get("chat_template", present)
    if saved != present and None not in (saved, present):
        rule = f"gives another template than the one that {folder} was tuned with"
        fix = f"make it what it was; a copy is {folder / TOKENIZER_FOLDER_NAME / TEMPLATE_FILE_NAME}"
        raise ConfigError([Problem("data.chat.template", run.cfg.data.chat.template, rule, fix)])


def _template_digest(run: TrainingRun) -> str | None:
    source = run.data.chat_template
    return None if source is None else hashlib.sha256(source.encode()).hexdigest()


def _check_has_optimizer(state: dict, folder: Path) -> None:
    optimizer = {"optimizer": dict(state["optimizer"])}
    try:
        check_same_tensors(optimizer, folder)
    except CheckpointRefusedError as error:
        raise CheckpointRefusedError(f"the optimizer's state does not fit. {error}") from None


def _prepare(run: TrainingRun, final: Path, needed: int) -> None:
    """Make the folder and its small files, after a look at the room on the disk."""
    try:
        temporary = begin(final)
        free = shutil.disk_usage(temporary).free
        if free < needed:
            shutil.rmtree(temporary)
            raise CheckpointError(
                f"{final.parent}: a checkpoint takes {needed / 2**20:,.1f} MiB and the disk has "
                f"{free / 2**20:,.1f} MiB free.\n      fix: make room, or keep fewer checkpoints (checkpoint.keep_last)"
            )
        _write_companions(run, temporary)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written: {error.strerror or error}") from None


def _write_companions(run: TrainingRun, folder: Path) -> None:
    state = run.state
    progress = {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "validation_loss": state.validation_loss,
        "recent": state.recent,
        "chat_template": _template_digest(run),
    }
    (folder / TRAINING_FILE_NAME).write_text(json.dumps(progress))
    shutil.copyfile(run.run_dir / CONFIG_FILE_NAME, folder / CONFIG_FILE_NAME)
    run.tokenizer.save(folder / TOKENIZER_FOLDER_NAME)
    if run.data.chat_template is not None:
        save_template(run.data.chat_template, folder / TOKENIZER_FOLDER_NAME)
    if run.cfg.peft is not None:
        write_description(folder, run.cfg.peft, run.base_fingerprint)


def _bytes_to_write(state: dict, device: torch.device) -> int:
    """Bytes of all tensors over all ranks, each counted once."""
    tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    own = sum(t.data.numel() * t.data.element_size() for t in tensors if is_main_replica(t.replica_id))
    total = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total.item())


def _finish_parameter_gathering(run: TrainingRun) -> None:
    """With late gathering, weights of other data-parallel ranks are still those before the update: fetch them now."""
    if run.cfg.parallelism.overlap_param_gather:
        for chunk in run.model:
            chunk.start_param_sync(force_sync=True)
