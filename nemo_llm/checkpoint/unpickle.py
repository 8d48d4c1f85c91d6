"""What a checkpoint may hold beside plain tensors: nothing that runs code when it is read.

Megatron's format has two pickled files: ``.metadata`` (names, shapes and places of the tensors) and ``common.pt``.
PyTorch and Megatron-Core read the first with plain pickle, which may call anything; here it is read before, by an
unpickler that knows the few classes it is made of.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_llm.errors import CheckpointDamagedError, CheckpointError

_ALLOWED = {
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "slice", "complex", "list", "dict", "tuple"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_device_tensor_from_numpy"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
        "BytesIOWriteData",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class Inert:
    """In the place of an object of a class that is not allowed: takes whatever a pickle does to it and does nothing."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        del arguments, keywords

    def __call__(self, *arguments: Any, **keywords: Any) -> "Inert":
        del arguments, keywords
        return Inert()

    def __setstate__(self, state: Any) -> None:
        del state

    def __setitem__(self, key: Any, value: Any) -> None:
        del key, value

    def append(self, value: Any) -> None:
        """Ignored."""

    def extend(self, values: Any) -> None:
        """Ignored."""


_TENSOR_CLASSES = {
    "collections": {"OrderedDict"},
    "argparse": {"Namespace"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _TENSOR_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return Inert


class _InertPickle:
    """What ``torch.load`` asks of a pickle module; with it nothing that a file names is imported or called."""

    __name__ = "inert"
    Unpickler = _InertUnpickler
    load = staticmethod(lambda file, **settings: _InertUnpickler(file, **settings).load())


def load_inert(path: Path) -> Any:
    """A file of ``torch.save`` by another program: tensors, plain containers and Namespaces; an `Inert` for the rest.

    Unlike ``weights_only`` it reads files with objects of any class (Megatron-LM saves its whole command line, enums of
    every version among it) and lets none of them do anything.

    Raises:
        CheckpointDamagedError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_InertPickle, mmap=True)
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{path}: missing") from None
    except Exception as error:  # pickle raises whatever a damaged stream leads it to
        raise CheckpointDamagedError(f"{path}: damaged; {type(error).__name__}: {error}") from None


def read_metadata(state: Path) -> Any:
    """PyTorch's ``Metadata`` of a distributed checkpoint.

    Raises:
        CheckpointError: the file holds anything else.
        CheckpointDamagedError: it cannot be read.
    """
    path = state / ".metadata"
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{path}: missing") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, since reading it could run code: {error}. It should hold names, shapes and places of "
            "tensors alone"
        ) from None
    except Exception as error:  # pickle raises whatever a damaged stream leads it to
        raise CheckpointDamagedError(f"{path}: damaged; {type(error).__name__}: {error}") from None


def check_safe(state: Path) -> None:
    """Refuse pickled files that could run code when Megatron reads them.

    Raises:
        CheckpointError, CheckpointDamagedError: names the file and what it asks for.
    """
    metadata = read_metadata(state)
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            _check_bytes(state / place.relative_path, index.fqn, place)
    path = state / "common.pt"
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{path}: missing") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: refused, since reading it could run code: {reason}") from None
    except RuntimeError as error:
        raise CheckpointDamagedError(f"{path}: damaged; {error}") from None


def _check_bytes(path: Path, name: str, place: Any) -> None:
    """An object that Megatron saves beside the tensors, such as Transformer Engine's fp8 scales."""
    with path.open("rb") as file:
        file.seek(place.offset)
        content = io.BytesIO(file.read(place.length))
    try:
        torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: {name} refused, since reading it could run code: {reason}") from None
