"""Weights of NeMo 1 that several ranks saved, each its own part, as the weights of the whole model."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.unpickle import read_torch
from nemo_llm.errors import InputError

_FOLDER = re.compile(r"(?:mp_rank_(?P<only>\d+)|tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+))$")
_LAYER = re.compile(r"(\.layers\.)(\d+)\.")
_ROWS = (".linear_qkv.", ".linear_fc1.", "word_embeddings.weight", "output_layer.weight")
_COLUMNS = (".linear_proj.weight", ".linear_fc2.weight")


class RankFiles(Mapping[str, torch.Tensor]):
    """The whole tensors by name, each joined from tensor-parallel ranks when it is asked for.

    Args:
        folder: what the archive holds: ``mp_rank_NN`` or ``tp_rank_NN_pp_rank_NNN``, a ``model_weights.ckpt`` in each.
        num_layers: layers of the whole model, of which each pipeline stage has as many.
        gated: whether the MLP is gated: the gate's rows come before the others' on every rank.

    Raises:
        InputError: parts that are missing, or of interleaved stages.
        CheckpointDamagedError: a file that cannot be read.
    """

    def __init__(self, folder: Path, num_layers: int, gated: bool) -> None:
        self._gated = gated
        files = {}
        for path in sorted(folder.rglob("*.ckpt")):
            place = _FOLDER.search(path.parent.name)
            if place is not None:
                files[int(place["pp"] or 0), int(place["only"] or place["tp"] or 0)] = path
        stages, ranks = (1 + max((place[axis] for place in files), default=-1) for axis in (0, 1))
        missing = [(tp, pp) for pp in range(stages) for tp in range(ranks) if (pp, tp) not in files]
        if missing or not files:
            said = ", ".join(f"tp {tp} pp {pp}" for tp, pp in missing[:8]) or "all"
            raise InputError(f"{folder}: parts of tensor- and pipeline-parallel ranks are missing: {said}")
        if num_layers % stages:
            raise InputError(f"{folder}: {num_layers} layers do not spread evenly over {stages} pipeline stages")
        self._parts: dict[str, list[torch.Tensor]] = {}
        for (pp, _), path in sorted(files.items()):
            self._add(read_torch(path, None), pp * (num_layers // stages), path)

    def _add(self, state: Any, first_layer: int, path: Path) -> None:
        if not isinstance(state, Mapping):
            raise InputError(f"{path}: holds a {type(state).__name__}, and weights are tensors by name")
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                continue
            if name.startswith("model0."):
                raise InputError(
                    f"{path}: holds the chunks of an interleaved pipeline; convert it to plain stages first"
                )
            whole = _LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + first_layer}.", name)
            self._parts.setdefault(whole, []).append(tensor)

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0]
        if ".linear_fc1." in name and self._gated:
            return torch.cat(
                [half for halves in zip(*(part.chunk(2) for part in parts), strict=True) for half in halves]
            )
        if any(word in name for word in _ROWS) and ".layer_norm_" not in name:
            return torch.cat(parts)
        return torch.cat(parts, 1) if name.endswith(_COLUMNS) else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
