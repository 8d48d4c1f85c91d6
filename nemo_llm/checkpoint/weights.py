"""Model weights of a checkpoint, on any layout."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from megatron.core.utils import unwrap_model

from nemo_llm.checkpoint.collective_errors import raise_together
from nemo_llm.checkpoint.folder import require_weights
from nemo_llm.checkpoint.safe_load import check_safe, load_sharded, stored_shapes
from nemo_llm.checkpoint.writer import StateWriter
from nemo_llm.errors import CheckpointRefusedError
from nemo_llm.log import get_logger
from nemo_llm.models.layers.classification_head import HEAD_PREFIX

_SHOWN = 6

_log = get_logger(__name__)


def model_state(chunks: list[torch.nn.Module]) -> dict:
    """Megatron's sharded state dict of these chunks (``model0`` and so on): names and global offsets, no layout."""
    # Unwrapped: the wrapper of 16-bit models would put its own prefix before every name.
    return {f"model{number}": unwrap_model(chunk).sharded_state_dict() for number, chunk in enumerate(chunks)}


def apply_model_state(chunks: list[torch.nn.Module], loaded: dict) -> None:
    """Copy what was loaded for `model_state` into the chunks."""
    for number, chunk in enumerate(chunks):
        unwrap_model(chunk).load_state_dict(loaded[f"model{number}"])


def save_weights(chunks: list[torch.nn.Module], temporary: Path) -> None:
    """Write the weights into ``temporary / "state"``; a collective of all ranks."""
    plan = StateWriter(None, threads=2).begin(model_state(chunks), temporary / "state", copy=False)
    plan.write()
    with raise_together():
        if dist.get_rank() == 0:
            plan.collect()


def load_weights(chunks: list[torch.nn.Module], folder: Path, new_head: bool = False) -> None:
    """Read the weights of ``folder``, whatever layout wrote it, into the chunks; a collective of all ranks.

    What else the checkpoint holds (optimizer state) is left alone.

    Args:
        new_head: a head of these chunks that the checkpoint of a language model lacks keeps the weights that it has.

    Raises:
        CheckpointRefusedError: another model: tensors that are missing there or have another shape; on every rank.
    """
    with raise_together():
        require_weights(folder)
        wanted, _ = _wanted(chunks, folder, new_head)
        check_same_tensors(wanted, folder)
    wanted, kept = _wanted(chunks, folder, new_head)  # anew: the check took it apart
    if any(kept.values()):
        _log.info("%s holds no head: it starts from random weights", folder)
    loaded = load_sharded(wanted, folder / "state")
    for name, head in kept.items():
        loaded[name].update(head)
    apply_model_state(chunks, loaded)


def _wanted(
    chunks: list[torch.nn.Module], folder: Path, new_head: bool
) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """What to read of ``folder``, and by chunk the weights of a head that are not to be found there."""
    state = model_state(chunks)
    if not new_head or any(key.startswith(HEAD_PREFIX) for key in stored_shapes(folder / "state")):
        return state, {}
    return state, {
        name: {key: part.pop(key).data for key in list(part) if key.startswith(HEAD_PREFIX)}
        for name, part in state.items()
    }


def check_same_tensors(wanted: dict, folder: Path) -> None:
    """Refuse a checkpoint that does not hold every tensor of this sharded state dict in its global shape.

    Raises:
        CheckpointRefusedError: listing the first tensors that are missing or of another shape, with both shapes; or
            files that hold more than tensors.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        check_safe(folder / "state")
    saved = stored_shapes(folder / "state")
    wanted = dict(wanted)
    apply_factories(wanted)
    problems = []
    for tensor in nested_values(wanted):
        if not isinstance(tensor, ShardedTensor):
            continue
        assert not isinstance(tensor, ShardedTensorFactory)
        if tensor.key not in saved:
            problems.append(f"{tensor.key}: expected {list(tensor.global_shape)}, found no such tensor")
        elif saved[tensor.key] != tuple(tensor.global_shape):
            found = list(saved[tensor.key])
            problems.append(f"{tensor.key}: expected {list(tensor.global_shape)}, found {found}")
    if problems:
        problems = sorted(set(problems))
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointRefusedError(
            f"{folder} holds another model than this run's configuration makes:\n  "
            + "\n  ".join([*problems[:_SHOWN], *more])
            + f"\n      fix: {folder / 'config.yaml'} shows the model section that it was made with; the first size of "
            "embedding and output is the padded vocabulary"
        )
