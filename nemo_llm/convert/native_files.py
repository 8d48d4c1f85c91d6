"""Our checkpoints as files: slices of tensors read and written one at a time, without a process group or a model.

The format is PyTorch's distributed checkpoint as Megatron-Core uses it (``torch_dist``): parts of tensors as
``torch.save`` writes them, one after the other in ``*.distcp`` files, and their places in ``.metadata``.

Of PyTorch 2.13 `_StorageInfo` is used, the class of these places: there is no public one.
tests/models/test_megatron_contract.py fails when it is gone.
"""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

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

from nemo_llm.checkpoint.manifest import BlockHasher
from nemo_llm.checkpoint.unpickle import read_metadata
from nemo_llm.convert.hf_files import TensorInfo
from nemo_llm.errors import CheckpointDamagedError

_METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE_NAME = "__0_0.distcp"
# Megatron's linear layers keep an entry of their own beside the weights (Transformer Engine's scales; here none).
_WITH_EXTRA_STATE = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


class HashedFile:
    """A file that is only appended to, hashed on the way; what ``torch.save`` asks of a file."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("wb", buffering=0)
        self._hasher = BlockHasher()

    def write(self, data: Any) -> int:
        """Append bytes; all of them are written on return."""
        view = memoryview(data).cast("B")
        self._hasher.update(view)
        written = 0
        while written < len(view):
            written += self._raw.write(view[written:])
        return written

    def tell(self) -> int:
        """Bytes written."""
        return self._hasher.num_bytes

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self, sync: bool) -> dict[str, Any]:
        """Close the file, brought to the disk if asked; returns its manifest entry."""
        if sync:
            os.fsync(self._raw.fileno())
        self._raw.close()
        return self._hasher.entry()


class NativeReader:
    """Slices of the tensors of one ``state`` folder, whatever layout wrote it.

    Raises:
        CheckpointError, CheckpointDamagedError: ``.metadata`` is missing, damaged or holds what could run code.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        metadata = read_metadata(state)
        self.infos: dict[str, TensorInfo] = {}
        self._parts: dict[str, list[tuple[ChunkStorageMetadata, Any]]] = {}
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata) or key.startswith("optimizer."):
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
            part = self._load(place)
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

    def _load(self, place: Any) -> torch.Tensor:
        path = self.state / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointDamagedError(f"{path}: damaged; {error}") from None


class NativeWriter:
    """Writes one ``state`` folder, slice by slice. Use as a context manager; the end writes ``.metadata``."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.entries: dict[str, dict[str, Any]] = {}
        """Manifest entries of the files, hashed as they were written."""
        self._places: dict[MetadataIndex, Any] = {}
        self._described: dict[str, Any] = {}
        self._file = HashedFile(state / _FILE_NAME)

    def write(self, key: str, index: tuple[int, ...], axes: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Write the slice at ``index`` of leading axes of sizes ``axes``."""
        tensor = tensor.contiguous()
        offsets = torch.Size((*index, *(0 for _ in tensor.shape)))
        sizes = torch.Size((*(1 for _ in index), *tensor.shape))
        if key not in self._described:
            properties = TensorProperties(dtype=tensor.dtype)
            self._described[key] = TensorStorageMetadata(properties, torch.Size((*axes, *tensor.shape)), [])
        self._described[key].chunks.append(ChunkStorageMetadata(offsets, sizes))
        content = tensor.view(sizes)
        if content.untyped_storage().nbytes() != content.numel() * content.element_size():
            content = content.clone()  # of a view, torch.save would write all that it is a view of
        self._append(MetadataIndex(key, offsets), content)
        if key.endswith(_WITH_EXTRA_STATE):
            place = f"shard_{'.'.join(map(str, index))}_{'.'.join(map(str, axes))}"
            name = f"{key.removesuffix('weight')}_extra_state/{place}"
            self._described[name] = BytesStorageMetadata()
            self._append(MetadataIndex(name), [None])

    def _append(self, index: MetadataIndex, content: Any) -> None:
        start = self._file.tell()
        torch.save(content, self._file)
        self._places[index] = _StorageInfo(_FILE_NAME, start, self._file.tell() - start)

    def __enter__(self) -> "NativeWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        entry = self._file.close(sync=kind is None)
        if kind is not None:
            return
        self.entries[f"state/{_FILE_NAME}"] = entry
        metadata = Metadata(self._described, None, self._places, StorageMeta(), "1.0.0")
        (self.state / ".metadata").write_bytes(pickle.dumps(metadata))
        torch.save({}, self.state / "common.pt")
        (self.state / "metadata.json").write_text(json.dumps(_METADATA_JSON), encoding="utf-8")
