"""Look into checkpoints on CPU, without a run: what is in one, whether it is whole, how two differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.folder import CONFIG_FILE_NAME, read_progress, resolve_checkpoint
from nemo_llm.checkpoint.manifest import read_manifest
from nemo_llm.checkpoint.safe_load import check_safe
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.checkpoint.state_files import NativeReader, TensorInfo


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two checkpoints; NaN counts as different from everything but NaN."""

    name: str
    what: str


def tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name, in the order of names; nothing is read but the names."""
    return dict(sorted(NativeReader(folder / "state", optimizer=True).infos.items()))


def read_tensors(folder: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor), one at a time."""
    check_safe(folder / "state")
    reader = NativeReader(folder / "state", optimizer=True)
    for name in names:
        yield name, reader.read(name)


def show(path: Path, with_norms: bool) -> Iterator[str]:
    """Lines that describe a checkpoint: where it stands, its files, its tensors.

    Raises:
        CheckpointNotFoundError, CheckpointDamagedError, CheckpointError: as `resolve_checkpoint` and `read_manifest`.
    """
    folder = resolve_checkpoint(path)
    manifest = read_manifest(folder)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    yield f"{folder}: format {manifest['schema']}, {len(manifest['files'])} files, {total / 2**20:,.1f} MiB"
    state = read_progress(folder)
    if state is not None:
        yield (
            f"step {state['step']:,}, {state['consumed_samples']:,} samples, {state['consumed_tokens']:,} tokens, "
            f"validation loss {state.get('validation_loss')}"
        )
        if state.get("recent"):
            losses = ", ".join(f"{step}: {loss:.4f}" for step, loss, _ in state["recent"][-5:])
            yield f"last losses  {losses}"
    else:
        yield "weights alone, no training state"
    yield from _show_config(folder)
    found = tensors(folder)
    weights = [info for name, info in found.items() if not name.startswith("optimizer.")]
    count = sum(info.meta().numel() for info in weights)
    yield f"{len(weights)} weight tensors with {count:,} elements, {len(found)} tensors in all"
    norms = {}
    if with_norms:
        norms = {name: float(tensor.double().norm()) for name, tensor in read_tensors(folder, list(found))}
    for name, info in found.items():
        norm = f"  norm {norms[name]:.6g}" if with_norms else ""
        yield f"  {name}  {str(info.dtype).removeprefix('torch.')} {list(info.shape)}{norm}"


def _show_config(folder: Path) -> Iterator[str]:
    config = SavedRun.at(folder).mapping
    header = [line for line in (folder / CONFIG_FILE_NAME).read_text().splitlines() if line.startswith("# versions")]
    yield from (line.removeprefix("# ") for line in header)
    model = config["model"]
    layout = {
        key: size for key, size in config["parallelism"].items() if key.endswith("_size") and size not in (1, None)
    }
    yield (
        f"model {model['name']}: {model['num_layers']} layers, hidden {model['hidden_size']}; "
        f"{config['precision']['name']}; written on {layout or 'one model-parallel rank'}"
    )


def diff(first: Path, second: Path) -> Iterator[TensorDifference]:
    """Yield every difference of two checkpoints, tensors in the order of their names.

    Raises:
        CheckpointNotFoundError, CheckpointDamagedError, CheckpointError: one of them cannot be read.
    """
    folders = [resolve_checkpoint(path) for path in (first, second)]
    left, right = (tensors(folder) for folder in folders)
    for name in sorted(left.keys() ^ right.keys()):
        yield TensorDifference(name, f"only in {folders[0] if name in left else folders[1]}")
    both = []
    for name in sorted(left.keys() & right.keys()):
        if left[name] == right[name]:
            both.append(name)
        else:
            a, b = left[name], right[name]
            yield TensorDifference(name, f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
    pairs = zip(read_tensors(folders[0], both), read_tensors(folders[1], both), strict=True)
    for (name, a), (_, b) in pairs:
        difference = compare(a, b)
        if difference:
            yield TensorDifference(name, difference)


def compare(a: torch.Tensor, b: torch.Tensor) -> str:
    """How two tensors of one shape differ, in words; empty where they are equal bit by bit."""
    different = _bits(a) != _bits(b)
    count = int(different.sum())
    if count == 0:
        return ""
    x, y = a.double(), b.double()
    place = [int(index) for index in different.nonzero()[0]]
    largest = float((x - y).abs().nan_to_num(nan=float("inf")).max())
    relative = float((x - y).norm() / x.norm().clamp_min(1e-300))
    return (
        f"{count:,} of {a.numel():,} elements differ, first at {place}: {float(x[tuple(place)]):.9g} against "
        f"{float(y[tuple(place)]):.9g}; largest difference {largest:.3g}, norms {float(x.norm()):.9g} and "
        f"{float(y.norm()):.9g}, norm of the difference {relative:.3g} of the first's"
    )


def _bits(tensor: torch.Tensor) -> Any:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])
