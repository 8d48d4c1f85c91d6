"""Distributed checkpoints (``torch_dist``) through Megatron-Core, their files read by nemo_llm/checkpoint/unpickle.py.

PyTorch and Megatron-Core read ``.metadata`` and stored objects with plain pickle, which may call anything. Here they
are given a `Metadata` that is built anew from checked plain values, tensors and objects that were read without
pickle, and nothing of the files themselves.

Megatron-Core has no argument for its reader of files, which is therefore replaced for the whole process
(megatron/patches.toml, `checkpoint_reader`).
"""

import io
import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader
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
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from nemo_llm.checkpoint.unpickle import TENSOR_NAMES, Record, read_pickle, read_torch, read_torch_part
from nemo_llm.errors import CheckpointDamagedError, CheckpointRefusedError
from nemo_llm.megatron.checkpoint import read_files_by

_PYTORCH = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_METADATA_NAMES = {
    *("collections.defaultdict", "builtins.slice", "torch.serialization._get_layout"),
    *("pathlib.PosixPath", "pathlib.Path", "pathlib.PurePosixPath", "pathlib._local.PosixPath"),
    *(f"{_PYTORCH}.metadata.{name}" for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata")),
    *(f"{_PYTORCH}.metadata.{name}" for name in ("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"{_PYTORCH}.metadata.{name}" for name in ("TensorProperties", "TensorStorageMetadata")),
    *(f"{_PYTORCH}.planner.{name}" for name in ("SavePlan", "TensorWriteData", "WriteItem")),
    *(f"{_PYTORCH}.planner.{name}" for name in ("WriteItemType", "BytesIOWriteData")),
    f"{_PYTORCH}.filesystem._StorageInfo",
    f"{_PYTORCH}.filesystem._StoragePrefix",
    f"{_MEGATRON}.MCoreMetadata",
    f"{_MEGATRON}.MCoreSavePlan",
}
# Of Transformer Engine 2.9 to 2.11 (TransformerEngineBaseModule.get_extra_state): one pickle in a tensor of bytes.
_SCALES = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
_RECIPES = "transformer_engine.common.recipe."
_SCALES_NAMES = TENSOR_NAMES | {
    "torch.storage._load_from_bytes",
    *(f"{_RECIPES}{name}" for name in ("DelayedScaling", "Format", "_FormatHelper", "Float8CurrentScaling")),
    *(f"{_RECIPES}{name}" for name in ("Float8BlockScaling", "MXFP8BlockScaling", "QParams", "MMParams")),
}


def read_metadata(state: Path) -> Metadata:
    """PyTorch's ``Metadata`` of a distributed checkpoint, built anew: names, shapes and places, each of them checked.

    What else the file holds (plans of the save) is left out.

    Raises:
        CheckpointRefusedError: it holds other things, or a place that is not in a file of this folder.
        CheckpointDamagedError: it or a file that it names is missing or cannot be read.
    """
    path = state / ".metadata"
    try:
        with path.open("rb") as file:
            found = read_pickle(file, path, _METADATA_NAMES)
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{path}: missing") from None
    try:
        fields = _fields(found, f"{_PYTORCH}.metadata.Metadata", f"{_MEGATRON}.MCoreMetadata")
        described = {_exact(name, str): _described(entry) for name, entry in fields["state_dict_metadata"].items()}
        places = {_index(index): _place(place) for index, place in _exact(fields["storage_data"], dict).items()}
        _check_places(state, described, places)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointRefusedError(
            f"{path}: refused, since it should hold names, shapes and places of tensors alone: {error}"
        ) from None
    return Metadata(described, None, places, StorageMeta(), "1.0.0")


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        what = value.name if isinstance(value, Record) else type(value).__name__
        raise TypeError(f"a {what} stands where a {kind.__name__} belongs")
    return value


def _fields(record: Any, *names: str) -> dict[str, Any]:
    """The attributes of an object of one of these classes."""
    if not isinstance(record, Record) or record.name not in names:
        what = record.name if isinstance(record, Record) else type(record).__name__
        raise TypeError(f"{what} stands where {names[0]} belongs")
    return {} if record.state is None else _exact(record.state, dict)


def _numbers(value: Any) -> torch.Size:
    if any(type(number) is not int or number < 0 for number in _exact(value, tuple)):
        raise ValueError(f"{value!r} is no shape")
    return torch.Size(value)


def _described(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    bytes_name, tensor_name = (f"{_PYTORCH}.metadata.{kind}StorageMetadata" for kind in ("Bytes", "Tensor"))
    fields = _fields(entry, bytes_name, tensor_name)
    if entry.name == bytes_name:
        return BytesStorageMetadata()
    properties = fields["properties"]
    if not isinstance(properties, Record) or properties.name != f"{_PYTORCH}.metadata.TensorProperties":
        raise TypeError("a tensor has no TensorProperties")
    dtype = _exact(_exact(properties.state, tuple)[0], torch.dtype)
    chunks = []
    for chunk in _exact(fields["chunks"], list):
        bounds = _fields(chunk, f"{_PYTORCH}.metadata.ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_numbers(bounds["offsets"]), _numbers(bounds["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _numbers(fields["size"]), chunks)


def _index(index: Any) -> MetadataIndex:
    fields = _fields(index, f"{_PYTORCH}.metadata.MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_exact(fields["fqn"], str), None if offset is None else _numbers(offset))


def _place(place: Any) -> _StorageInfo:
    fields = _fields(place, f"{_PYTORCH}.filesystem._StorageInfo")
    name, (offset, length) = _exact(fields["relative_path"], str), _numbers((fields["offset"], fields["length"]))
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file in this folder")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name} is stored in a transformed form")
    return _StorageInfo(name, offset, length)


def _check_places(state: Path, described: dict[str, Any], places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Every part and object has its place, every place belongs to one, and all lie within their files."""
    wanted = set()
    for name, entry in described.items():
        if isinstance(entry, BytesStorageMetadata):
            wanted.add(MetadataIndex(name))
        else:
            wanted |= {MetadataIndex(name, chunk.offsets) for chunk in entry.chunks}
    missing = wanted - places.keys()
    if missing:
        raise ValueError(f"{min(index.fqn for index in missing)} has no place in a file")
    sizes = {}
    for place in places.values():
        name = place.relative_path
        if name not in sizes:
            try:
                sizes[name] = (state / name).stat().st_size
            except FileNotFoundError:
                raise CheckpointDamagedError(f"{state / name}: missing") from None
        if place.offset + place.length > sizes[name]:
            raise CheckpointDamagedError(
                f"{state / name}: damaged; it has {sizes[name]} bytes, and .metadata names {place.length} from "
                f"{place.offset} on"
            )


class FilePart(io.RawIOBase):
    """Some bytes of an open file as a file of their own, read straight into the memory of tensors."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length = descriptor, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError(f"seek to {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at)
        self._at += count
        return count


def stored_tensor(state: Path, name: str, place: _StorageInfo) -> torch.Tensor:
    """The part of the tensor `name` at one place of ``.metadata``."""
    content = _read_stored(state, place)
    if not isinstance(content, torch.Tensor):
        raise CheckpointRefusedError(f"{state / place.relative_path}: {name} is a {type(content).__name__}, no tensor")
    return content


def _read_stored(state: Path, place: _StorageInfo) -> Any:
    path = state / place.relative_path
    try:
        with path.open("rb", buffering=0) as file:
            return read_torch_part(FilePart(file.fileno(), place.offset, place.length), path)
    except OSError as error:
        raise CheckpointDamagedError(f"{path}: cannot be read: {error.strerror or error}") from None


def check_safe(state: Path) -> None:
    """Read everything but the tensors, so that what is refused is refused before the ranks begin to read together.

    Raises:
        CheckpointRefusedError, CheckpointDamagedError: names the file and what it asks for.
    """
    metadata = read_metadata(state)
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            stored_object(state, index.fqn, place)
    read_torch(state / "common.pt")


def stored_object(state: Path, name: str, place: _StorageInfo) -> Any:
    """An object that Megatron saves beside the tensors: nothing, or Transformer Engine's FP8 scales.

    Transformer Engine unpickles the bytes that it gets: it gets bytes that are made here from the tensors in them.
    """
    path = state / place.relative_path
    content = _read_stored(state, place)
    if content in (None, [None]) if not isinstance(content, torch.Tensor) else content.numel() == 0:
        return content
    if not isinstance(content, torch.Tensor) or content.dtype != torch.uint8:
        raise CheckpointRefusedError(f"{path}: {name} refused: it is neither empty nor Transformer Engine's bytes")
    found = read_pickle(io.BytesIO(content.numpy().tobytes()), path, _SCALES_NAMES)
    try:
        scales = {key: _exact(found[key], torch.Tensor) for key in _SCALES if key in _exact(found, dict)}
    except TypeError as error:
        raise CheckpointRefusedError(f"{path}: {name} refused: {error}") from None
    if not scales:
        return torch.empty(0, dtype=torch.uint8)  # other recipes than delayed scaling have no state
    made: dict[str, Any] = {**scales, "extra_fp8_variables": {}}
    if find_spec("transformer_engine") is not None:
        from transformer_engine.common.recipe import DelayedScaling

        made["recipe"] = DelayedScaling()  # until the first step, which brings the run's own
    return torch.frombuffer(bytearray(pickle.dumps(made)), dtype=torch.uint8)


class _Reader(FileSystemReader):
    """PyTorch's reader, which is given what was read here."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        if not hasattr(self, "_known"):
            self._known = read_metadata(Path(self.path))
        return self._known

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        state = Path(self.path)
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            if item.type == LoadItemType.BYTE_IO:
                content = io.BytesIO()
                torch.save(stored_object(state, item.storage_index.fqn, place), content)
                content.seek(0)
                planner.load_bytes(item, content)
                continue
            tensor = stored_tensor(state, item.storage_index.fqn, place)
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(axis, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != tensor.shape:
                raise CheckpointDamagedError(
                    f"{state / place.relative_path}: damaged; a part of {item.storage_index.fqn} has shape "
                    f"{list(tensor.shape)}, expected {list(target.shape)}"
                )
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _Common(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return read_torch(Path(checkpoint_dir) / "common.pt")


def reader(state: str | Path, cache_metadata: bool = False) -> FileSystemReader:
    """A reader of the folder ``state`` for PyTorch's ``load`` and for Megatron-Core."""
    del cache_metadata
    return _Reader(state)


read_files_by(reader)


def load_sharded(wanted: dict, state: Path, validate_access_integrity: bool = True) -> dict:
    """Megatron's ``dist_checkpointing.load``; call `check_safe` before, on one rank."""
    return dist_checkpointing.load(
        wanted,
        str(state),
        sharded_strategy=TorchDistLoadShardedStrategy(),
        common_strategy=_Common(),
        validate_access_integrity=validate_access_integrity,
    )


def stored_shapes(state: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor by its name."""
    entries = read_metadata(state).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
