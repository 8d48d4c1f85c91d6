"""Save and load a run in Megatron's layout-free ``torch_dist`` format, complete or invisible.

``checkpoints/step_00000010/`` holds ``state/`` (Megatron's distributed checkpoint), ``training.json``, ``config.yaml``,
``tokenizer/``, ``manifest.json`` (size and hash of every file) and, written last, ``COMPLETE``.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from nemo_llm.errors import CheckpointError, InputError
from nemo_llm.training.rundir import read_config
from nemo_llm.training.state import TrainingRun, TrainState

SCHEMA = 1
_OPTIMIZER_FORMAT = {
    # The one format of Megatron's optimizer state that another TP or PP can read.
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save_checkpoint(run: TrainingRun) -> Path:
    """Write the present state under ``run.run_dir``; returns the folder, which is complete on return."""
    final = run.run_dir / "checkpoints" / f"step_{run.state.step:08d}"
    if (final / "COMPLETE").exists():
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    if run.runtime.is_first_rank:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "state").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded_state(run, is_loading=False), str(temporary / "state"))
    if run.runtime.is_first_rank:
        _write_companions(run, temporary)
        _commit(temporary, final)
        _remove_old(run)
    dist.barrier()
    return final


def sharded_state(run: TrainingRun, is_loading: bool) -> dict:
    """Model and optimizer as Megatron's sharded state dict: names and global offsets, no layout."""
    # Unwrapped: the wrapper of 16-bit models would put its own prefix before every name.
    model = {f"model{number}": unwrap_model(chunk).sharded_state_dict() for number, chunk in enumerate(run.model)}
    in_one = model["model0"] if len(model) == 1 else model
    optimizer = run.optimizer.sharded_state_dict(in_one, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    return {**model, "optimizer": optimizer}


def load_checkpoint(run: TrainingRun, folder: Path) -> None:
    """Read ``folder`` into the run, whatever layout wrote it.

    Raises:
        CheckpointError: a file that is missing or does not have the size and hash that the manifest says.
    """
    if run.runtime.is_first_rank:
        verify(folder)
    _check_expert_layout(run, folder)
    dist.barrier()
    loaded = dist_checkpointing.load(sharded_state(run, is_loading=True), str(folder / "state"))
    for number, chunk in enumerate(run.model):
        unwrap_model(chunk).load_state_dict(loaded[f"model{number}"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    progress = json.loads((folder / "training.json").read_text())
    run.state = TrainState(progress["step"], progress["consumed_samples"], progress["consumed_tokens"])


def _check_expert_layout(run: TrainingRun, folder: Path) -> None:
    """Refuse another split of the experts: loading it through megatron-core 0.16.1 ended the process on CPU."""
    if run.cfg.model.moe is None:
        return
    saved = read_config(folder)["parallelism"]
    for key in ("expert_model_parallel_size", "expert_tensor_parallel_size", "tensor_model_parallel_size"):
        now = getattr(run.cfg.parallelism, key)
        if saved[key] != now:
            raise CheckpointError(
                f"{folder}: experts were saved with parallelism.{key} = {saved[key]} and cannot be read with {now}; "
                f"resume with parallelism.{key}={saved[key]} (pipeline, context and data parallelism may change)"
            )


def find_checkpoint(path: Path) -> Path | None:
    """Newest complete checkpoint at ``path``: a run folder, its ``checkpoints/`` or one ``step_*``; None if none."""
    if (path / "COMPLETE").exists():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    complete = [step for step in folder.glob("step_*") if (step / "COMPLETE").exists()]
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


def _write_companions(run: TrainingRun, folder: Path) -> None:
    progress = {
        "step": run.state.step,
        "consumed_samples": run.state.consumed_samples,
        "consumed_tokens": run.state.consumed_tokens,
    }
    (folder / "training.json").write_text(json.dumps(progress, indent=1))
    shutil.copyfile(run.run_dir / "config.yaml", folder / "config.yaml")
    run.tokenizer.save(folder / "tokenizer")


def _commit(temporary: Path, final: Path) -> None:
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
    (final / "COMPLETE").touch()
    for path in (final / "COMPLETE", final, final.parent):
        _fsync(path)


def _remove_old(run: TrainingRun) -> None:
    keep = run.cfg.checkpoint.keep_last
    if keep is None:
        return
    folders = sorted((run.run_dir / "checkpoints").glob("step_*"), key=lambda path: int(re.sub(r"\D", "", path.name)))
    complete = [folder for folder in folders if (folder / "COMPLETE").exists()]
    for folder in complete[:-keep]:
        (folder / "COMPLETE").unlink()
        shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
