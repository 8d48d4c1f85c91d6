"""Model weights of a checkpoint, on any layout."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model


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
    dist_checkpointing.save(model_state(chunks), str(temporary / "state"))


def load_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    """Read the weights of ``folder``, whatever layout wrote it, into the chunks; a collective of all ranks.

    What else the checkpoint holds (optimizer state) is left alone.
    """
    apply_model_state(chunks, dist_checkpointing.load(model_state(chunks), str(folder / "state")))
