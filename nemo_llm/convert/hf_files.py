"""Hugging Face folders as files: tensors read one at a time, and written in shards whose headers are known before."""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_llm.checkpoint.state_files import TensorInfo
from nemo_llm.checkpoint.unpickle import read_torch
from nemo_llm.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"

# Names of safetensors for the types that weights come in.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class HfReader:
    """The tensors of a folder, sharded or not. Use as a context manager.

    Raises:
        InputError: no safetensors there, a shard that is missing or damaged, a type that is no plain float.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        """With ``allow_pickle``, ``pytorch_model*.bin`` is read where there are no safetensors; tensors alone."""
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._stack = ExitStack()
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        if allow_pickle and pickled and not any(folder.glob("*.safetensors")):
            for path in pickled:
                self._open_pickled(path)
            return
        for path in _shards(folder):
            self._open(path)

    def _open_pickled(self, path: Path) -> None:
        tensors = read_torch(path)
        if not isinstance(tensors, dict):
            raise InputError(f"{path}: refused; it holds a {type(tensors).__name__}, and weights are tensors by name")
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise InputError(f"{path}: refused; {name!r} is no name of a tensor")
            if not isinstance(tensor, torch.Tensor):
                kind = type(tensor).__name__
                raise InputError(
                    f"{path}: refused; {name} is a {kind}, and weights are tensors: is it a training state?"
                )
            self._pickled[name] = tensor
            self.infos[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, "pt"))
        except FileNotFoundError:
            raise InputError(f"{path}: missing, but the index of the folder names it") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged or truncated safetensors file: {error}") from None
        types = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        for name in file.keys():  # noqa: SIM118  (no mapping)
            part = file.get_slice(name)
            if part.get_dtype() not in types:
                raise InputError(
                    f"{path}: {name} has type {part.get_dtype()}; only {', '.join(types)} can be converted. A "
                    "quantised model must be dequantised first"
                )
            self.infos[name] = TensorInfo(tuple(part.get_shape()), types[part.get_dtype()])
            self._files[name] = file

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        if name in self._pickled:
            return self._pickled[name]
        return self._files[name].get_tensor(name)

    def __enter__(self) -> "HfReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{index}: not readable as an index of shards: {error}") from None
        for name, path in zip(names, paths, strict=True):
            if Path(name).is_absolute() or ".." in path.relative_to(folder).parts:
                raise InputError(f"{index}: refused; the shard {name!r} lies outside of the folder")
        return paths
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; it has {', '.join(pickled[:3])}, pickled files: allow_pickle=true reads them" if pickled else ""
        raise InputError(f"{folder}: holds no safetensors file{hint}")
    return [folder / WHOLE_NAME] if folder / WHOLE_NAME in found else found


def plan_shards(infos: dict[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names in shards of at most ``max_bytes`` (a single larger tensor has its own), in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.num_bytes
    return shards


def write_safetensors(
    folder: Path, infos: dict[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> None:
    """Write a folder's shards and their index, holding one tensor at a time.

    Args:
        infos: every tensor, in the order in which ``tensors`` brings them.
    """
    shards = _named_shards(infos, max_shard_bytes)
    stream = iter(tensors)
    for file_name, members in shards.items():
        _write_shard(folder / file_name, {name: infos[name] for name in members}, stream)
    if len(shards) > 1:
        weight_map = {name: file for file, members in shards.items() for name in members}
        total = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _named_shards(infos: dict[str, TensorInfo], max_shard_bytes: int) -> dict[str, list[str]]:
    shards = plan_shards(infos, max_shard_bytes)
    count = len(shards)
    names = [WHOLE_NAME] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    return dict(zip(names, shards, strict=True))


def written_names(folder: Path, infos: dict[str, TensorInfo], max_shard_bytes: int) -> set[str]:
    """Tensors that `write_safetensors` has written whole to ``folder`` before it was killed."""
    found: set[str] = set()
    for file_name, members in _named_shards(infos, max_shard_bytes).items():
        found.update(_written(folder / file_name, {name: infos[name] for name in members}))
    return found


def _written(path: Path, infos: dict[str, TensorInfo]) -> list[str]:
    header, position = _header(infos), 0
    try:
        size = path.stat().st_size - len(header)
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return []
    except FileNotFoundError:
        return []
    names = []
    for name, info in infos.items():
        position += info.num_bytes
        if position > size:
            break
        names.append(name)
    return names


def _header(infos: dict[str, TensorInfo]) -> bytes:
    """The beginning of a safetensors file that holds these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in infos.items():
        end = position + info.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, infos: dict[str, TensorInfo], stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write one file, or what of it is missing: tensors that are there already come without numbers."""
    done = _written(path, infos)
    header = _header(infos)
    with path.open("r+b" if done else "wb", buffering=0) as file:
        if not done:
            file.write(header)
        file.truncate(len(header) + sum(infos[name].num_bytes for name in done))
        file.seek(0, os.SEEK_END)
        for number, (name, info) in enumerate(infos.items()):
            given, tensor = next(stream)
            assert given == name, f"expected {name}, received {given}"
            assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} is not {info.shape}"
            if number >= len(done):
                _write_all(file, tensor.to(info.dtype).contiguous())


def _write_all(file: Any, tensor: torch.Tensor) -> None:
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while len(view):
        view = view[file.write(view) :]
