"""Adapters in checkpoints: what is saved, which frozen model it belongs to, and how it is read back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.collective_errors import raise_together
from nemo_llm.checkpoint.folder import ADAPTER_FILE_NAME
from nemo_llm.checkpoint.safe_load import load_sharded
from nemo_llm.checkpoint.weights import check_same_tensors
from nemo_llm.config.sections.peft import PeftConfig
from nemo_llm.errors import CheckpointDamagedError, CheckpointRefusedError
from nemo_llm.models.layers.classification_head import HEAD_PREFIX
from nemo_llm.peft.adapter import KEY_PREFIX, adapted_modules, adapter_state, heads


def write_description(folder: Path, peft: PeftConfig, base_fingerprint: str) -> None:
    """Say in ``folder`` what kind of adapter it holds and of which frozen weights."""
    content = {"base_fingerprint": base_fingerprint, "peft": dataclasses.asdict(peft)}
    (folder / ADAPTER_FILE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """What `write_description` wrote.

    Raises:
        CheckpointRefusedError: ``folder`` holds no adapter.
        CheckpointDamagedError: what stands there is no description.
    """
    path = folder / ADAPTER_FILE_NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path}: damaged; not readable as a description ({error})") from None
    except FileNotFoundError:
        raise CheckpointRefusedError(
            f"{folder} holds no adapter (no {ADAPTER_FILE_NAME}).\n      fix: name a checkpoint of a run with "
            "peft=..., or start from whole weights with checkpoint.init_from"
        ) from None


def check_base(folder: Path, base_fingerprint: str) -> None:
    """Refuse the adapter in ``folder`` when it was trained on other frozen weights.

    Raises:
        CheckpointRefusedError: naming both fingerprints.
    """
    trained_on = read_description(folder)["base_fingerprint"]
    if trained_on != base_fingerprint:
        raise CheckpointRefusedError(
            f"{folder} holds an adapter for another base model: it was trained on weights with fingerprint "
            f"{trained_on}, and this run's frozen weights have {base_fingerprint}.\n      fix: start from the weights "
            "that it was trained on; config.yaml in that folder names them (checkpoint.init_from, model.hf_path)"
        )


def load_adapter(chunks: list[torch.nn.Module], folder: Path, base_fingerprint: str) -> None:
    """Read the adapters of the checkpoint ``folder``, whatever layout wrote it; a collective of all ranks.

    Raises:
        CheckpointRefusedError: no adapter, one for other frozen weights, or one of another kind or shape.
    """
    state: dict[str, Any] = {"adapter": adapter_state(chunks)}
    with raise_together():
        check_base(folder, base_fingerprint)
        check_same_tensors(state, folder)
    apply_adapter_state(chunks, load_sharded(state, folder / "state")["adapter"])


@torch.no_grad()
def apply_adapter_state(chunks: list[torch.nn.Module], loaded: dict[str, torch.Tensor]) -> None:
    """Copy what was loaded for `adapter_state` into the adapters."""
    for module in adapted_modules(chunks):
        for name, shard in module.adapter.shards():
            getattr(module.adapter, name).copy_(loaded[shard.key])
    for head in heads(chunks):
        head.weight.copy_(loaded[f"{KEY_PREFIX}{HEAD_PREFIX}weight"])
