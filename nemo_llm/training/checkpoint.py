"""Save and load a run in Megatron's layout-free ``torch_dist`` format; `nemo_llm.checkpoint.folder` shows the files."""

import json
import re
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_llm.checkpoint.agree import raise_together
from nemo_llm.checkpoint.folder import begin, commit, is_complete, read_config, temporary_of
from nemo_llm.checkpoint.weights import apply_model_state, check_same_tensors, model_state
from nemo_llm.errors import CheckpointError
from nemo_llm.training.state import TrainingRun, TrainState

_OPTIMIZER_FORMAT = {
    # The one format of Megatron's optimizer state that another TP or PP can read.
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def save_checkpoint(run: TrainingRun) -> Path:
    """Write the present state under ``run.run_dir``; returns the folder, which is complete on return."""
    final = run.run_dir / "checkpoints" / f"step_{run.state.step:08d}"
    if is_complete(final):
        return final
    temporary = temporary_of(final)
    if run.runtime.is_first_rank:
        begin(final)
    dist.barrier()
    dist_checkpointing.save(sharded_state(run, is_loading=False), str(temporary / "state"))
    if run.runtime.is_first_rank:
        _write_companions(run, temporary)
        commit(temporary, final)
        _remove_old(run)
    dist.barrier()
    return final


def sharded_state(run: TrainingRun, is_loading: bool) -> dict:
    """Model and optimizer as Megatron's sharded state dict: names and global offsets, no layout."""
    model = model_state(run.model)
    in_one = model["model0"] if len(model) == 1 else model
    optimizer = run.optimizer.sharded_state_dict(in_one, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    return {**model, "optimizer": optimizer}


def load_checkpoint(run: TrainingRun, folder: Path) -> None:
    """Read ``folder``, which was verified before, into the run, whatever layout wrote it.

    Raises:
        CheckpointError: it holds another model, or another split of the experts.
    """
    with raise_together():
        check_same_tensors(model_state(run.model), folder)
        _check_expert_layout(run, folder)
    loaded = dist_checkpointing.load(sharded_state(run, is_loading=True), str(folder / "state"))
    apply_model_state(run.model, loaded)
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


def _write_companions(run: TrainingRun, folder: Path) -> None:
    progress = {
        "step": run.state.step,
        "consumed_samples": run.state.consumed_samples,
        "consumed_tokens": run.state.consumed_tokens,
    }
    (folder / "training.json").write_text(json.dumps(progress, indent=1))
    shutil.copyfile(run.run_dir / "config.yaml", folder / "config.yaml")
    run.tokenizer.save(folder / "tokenizer")


def _remove_old(run: TrainingRun) -> None:
    keep = run.cfg.checkpoint.keep_last
    if keep is None:
        return
    folders = sorted((run.run_dir / "checkpoints").glob("step_*"), key=lambda path: int(re.sub(r"\D", "", path.name)))
    complete = [folder for folder in folders if is_complete(folder)]
    for folder in complete[:-keep]:
        (folder / "COMPLETE").unlink()
        shutil.rmtree(folder)
