"""Our checkpoints as files: slices of tensors read and written one at a time, without a process group or a model.

The format is PyTorch's distributed checkpoint as Megatron-Core uses it (``torch_dist``): parts of tensors as
``torch.save`` writes them, one after the other in ``*.distcp`` files, and their places in ``.metadata``.

Of PyTorch 2.13 `_StorageInfo` is used, the class of these places: there is no public one.
tests/megatron/test_contract.py fails when it is gone.
"""

import io
import json
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from nemo_llm.checkpoint.manifest import BlockHasher
from nemo_llm.checkpoint.safe_load import read_metadata, stored_tensor
from nemo_llm.errors import CheckpointDamagedError

_METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE_NAME = "__0_0.distcp"
_JOURNAL_NAME = "written.log"
"""Ends of the slices in the file, while it is written: a conversion that was killed goes on from there."""
_READ_BYTES = 16 << 20
_ANNOUNCE_BYTES = 64 << 20
# Megatron's linear layers keep an entry of their own beside the weights (Transformer Engine's scales; here none).
_LATENT = tuple(f"linear_{part}_proj.weight" for part in ("q", "q_down", "q_up", "kv_down", "kv_up"))
_WITH_EXTRA_STATE = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight", *_LATENT)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size on the disk."""
        return self.meta().numel() * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """A tensor of this shape without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class StateFile:
    """A file that is only appended to, hashed on the way; a context manager, whose end brings it to the disk.

    Args:
        keep: bytes at its start that are there already and stay.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._name = path.name
        self._hasher = BlockHasher()
        self._raw = path.open("r+b" if keep else "wb", buffering=0)
        while self._hasher.num_bytes < keep:
            self._hasher.update(self._raw.read(min(keep - self._hasher.num_bytes, _READ_BYTES)))
        self._raw.truncate(keep)
        self._announced = keep

    def append(self, content: Any) -> _StorageInfo:
        """Append a tensor, wherever it is, an object as ``torch.save`` has it, or bytes; returns where it stands."""
        start = self.tell()
        if isinstance(content, io.BytesIO):
            self.write(content.getbuffer())
        else:
            torch.save(_alone(content.detach().cpu()) if isinstance(content, torch.Tensor) else content, self)
        return _StorageInfo(self._name, start, self.tell() - start)

    def write(self, data: Any) -> int:
        """Append bytes; all of them are written on return."""
        view = memoryview(data).cast("B")
        self._hasher.update(view)
        written = 0
        while written < len(view):  # an unbuffered file may take less than it is given
            written += self._raw.write(view[written:])
        ready = self.tell() - self._announced
        if ready >= _ANNOUNCE_BYTES:
            # Linux then begins to bring these pages to the disk, while the next are made, and not only at the fsync.
            os.posix_fadvise(self._raw.fileno(), self._announced, ready, os.POSIX_FADV_DONTNEED)
            self._announced = self.tell()
        return written

    def tell(self) -> int:
        """Bytes written."""
        return self._hasher.num_bytes

    def flush(self) -> None:
        """Nothing is kept back."""

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this file, when it is whole."""
        return self._hasher.entry()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        with self._raw:
            if kind is None:
                os.fsync(self._raw.fileno())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of its own: of a view, torch.save would write all that it is a view of."""
    if tensor.numel() == 0:
        return tensor.clone()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    content = tensor.contiguous().view(-1)
    return torch.frombuffer(content.view(torch.uint8).numpy(), dtype=tensor.dtype).view(tensor.shape)


def write_metadata(state: Path, metadata: Metadata, places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Write ``.metadata``: what there is, and where each part of it stands."""
    whole = replace(metadata, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    (state / ".metadata").write_bytes(pickle.dumps(whole))


class NativeReader:
    """Slices of the tensors of one ``state`` folder, whatever layout wrote it.

    Args:
        optimizer: whether those of the optimizer count, too.

    Raises:
        CheckpointError, CheckpointDamagedError: ``.metadata`` is missing, damaged or holds what could run code.
    """

    def __init__(self, state: Path, optimizer: bool = False) -> None:
        self.state = state
        metadata = read_metadata(state)
        self.infos: dict[str, TensorInfo] = {}
        self._parts: dict[str, list[tuple[ChunkStorageMetadata, Any]]] = {}
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata) or (key.startswith("optimizer.") and not optimizer):
                continue
            self.infos[key] = TensorInfo(tuple(entry.size), entry.properties.dtype)
            self._parts[key] = [(chunk, places[key, tuple(chunk.offsets)]) for chunk in entry.chunks]

    def read(self, key: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """The slice of ``key`` at ``index`` of its leading axes."""
        info = self.infos[key]
        depth = len(index)
        result: torch.Tensor | None = None
        for chunk, place in self._parts[key]:
            first = tuple(chunk.offsets)
            inside = all(f <= i < f + n for f, n, i in zip(first, chunk.sizes, index, strict=False))
            if not inside:
                continue
            part = stored_tensor(self.state, key, place)
            part = part[tuple(i - f for i, f in zip(index, first, strict=False))]
            if tuple(part.shape) == info.shape[depth:]:
                return part
            if result is None:
                result = torch.empty(info.shape[depth:], dtype=info.dtype)
            starts = first[depth:]
            result[tuple(slice(s, s + n) for s, n in zip(starts, part.shape, strict=True))] = part
        if result is None:
            raise CheckpointDamagedError(f"{self.state}: .metadata knows no place of {key} at {index}")
        return result


class NativeWriter:
    """Writes one ``state`` folder, slice by slice. Use as a context manager; the end writes ``.metadata``.

    In a folder where a writer was killed the same calls in the same order continue: slices that are there already need
    their shapes and types alone (`has_next`).
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.entries: dict[str, dict[str, Any]] = {}
        """Manifest entries of the files, hashed as they were written."""
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._described: dict[str, Any] = {}
        self._done = _read_journal(state)
        keep = self._done[-1][-1] if self._done else 0
        self.num_done = len(self._done)
        """Slices that are in the file already."""
        self._done.reverse()  # the first is taken from the end
        self._replayed = 0
        self._file = StateFile(state / _FILE_NAME, keep)
        self._journal = (state / _JOURNAL_NAME).open("a" if keep else "w", encoding="utf-8", buffering=1)

    def write(self, key: str, index: tuple[int, ...], axes: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Write the slice at ``index`` of leading axes of sizes ``axes``."""
        tensor = tensor.contiguous()
        offsets = torch.Size((*index, *(0 for _ in tensor.shape)))
        sizes = torch.Size((*(1 for _ in index), *tensor.shape))
        if key not in self._described:
            properties = TensorProperties(dtype=tensor.dtype)
            self._described[key] = TensorStorageMetadata(properties, torch.Size((*axes, *tensor.shape)), [])
        self._described[key].chunks.append(ChunkStorageMetadata(offsets, sizes))
        indices = [MetadataIndex(key, offsets)]
        if key.endswith(_WITH_EXTRA_STATE):
            place = f"shard_{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, axes or (1,)))}"
            indices.append(MetadataIndex(f"{key.removesuffix('weight')}_extra_state/{place}"))
            self._described[indices[1].fqn] = BytesStorageMetadata()
        start = self._replayed if self._done else self._file.tell()
        ends = self._done.pop() if self._done else self._append(tensor.view(sizes), len(indices))
        self._replayed = ends[-1]
        for entry, end in zip(indices, ends, strict=True):
            self._places[entry] = _StorageInfo(_FILE_NAME, start, end - start)
            start = end

    def _append(self, content: torch.Tensor, count: int) -> list[int]:
        """Write a tensor and, where ``count`` is 2, an empty extra state; returns where each ends."""
        places = [self._file.append(thing) for thing in (content, [None])[:count]]
        ends = [place.offset + place.length for place in places]
        self._journal.write(" ".join(map(str, ends)) + "\n")
        return ends

    def __enter__(self) -> "NativeWriter":
        # The manifest has better hashes than the CRC of torch's archives, which no reader compares.
        self._crc_before = get_crc32_options()
        set_crc32_options(False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        set_crc32_options(self._crc_before)
        self._journal.close()
        self._file.__exit__(kind, *error)
        if kind is not None:
            return
        (self.state / _JOURNAL_NAME).unlink()
        self.entries[f"state/{_FILE_NAME}"] = self._file.entry()
        write_metadata(self.state, Metadata(self._described), self._places)
        torch.save({}, self.state / "common.pt")
        (self.state / "metadata.json").write_text(json.dumps(_METADATA_JSON), encoding="utf-8")


def _read_journal(state: Path) -> list[list[int]]:
    """Ends of the slices that were written whole, in their order."""
    try:
        lines = (state / _JOURNAL_NAME).read_text(encoding="utf-8").split("\n")[:-1]  # the last may be cut
        size = (state / _FILE_NAME).stat().st_size
    except FileNotFoundError:
        return []
    ends = [[int(word) for word in line.split()] for line in lines]
    return [slice_ for slice_ in ends if slice_[-1] <= size]
