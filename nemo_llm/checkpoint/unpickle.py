"""Pickled files and files of ``torch.save`` as plain values: nothing that they name is imported, made or called.

A pickle is a small program that may ask for any class. Here the class that it gets is always a `Record`, which keeps
the name and what it was given; plain values are then built from the records by the few rules in `_Plain`. A
``torch.save`` file is a zip archive with one pickle and the bytes of each tensor, which are read here without
``torch.load``: that would run the program in a TorchScript archive.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from nemo_llm.errors import CheckpointDamagedError, CheckpointRefusedError

_DTYPES = {f"torch.{name}": kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
_STORAGES = {
    f"torch.{name}Storage": kind
    for name, kind in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}
_BYTES = "torch.storage.UntypedStorage"
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_NESTED = "torch.storage._load_from_bytes"
_PARAMETER = "torch._utils._rebuild_parameter"
TENSOR_NAMES = {*_STORAGES, _BYTES, *_TENSORS, _PARAMETER}
"""What a file of tensors alone asks for."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype)


class _Frozen(type):
    """Classes whose attributes no pickle can set."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of a class")


class Record(metaclass=_Frozen):
    """In the place of an object of any class: the class's name, what it was called with, its state.

    Attributes:
        name: ``module.class``.
        arguments: positional ones.
        state: what the pickle would have set as its attributes; None where it has not.
    """

    __slots__ = ("arguments", "state")
    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Record":
        del keywords
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __call__(self, *arguments: Any, **keywords: Any) -> "Record":
        """What an object of some class would give when called: again nothing but a record."""
        return type(self)(*arguments, **keywords)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of a mapping of some class: dropped."""

    def append(self, value: Any) -> None:
        """Entries of a list of some class: dropped."""

    def extend(self, values: Any) -> None:
        """As `append`."""

    def add(self, value: Any) -> None:
        """As `append`."""


class _Dict(dict, metaclass=_Frozen):
    """For OrderedDict, whose attributes (``_metadata`` in state dicts) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        del state


# Named in files and harmless: immutable types of Python itself.
_BUILT: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "torch.Size": tuple,
    **{f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}


class _Storage:
    """The bytes of one or several tensors, as a pickle refers to them."""

    __slots__ = ("words",)

    def __init__(self, words: Any) -> None:
        self.words = words


def _check_memo(file: BinaryIO) -> None:
    """Refuse a pickle that numbers its objects beyond its own length; the file stands where it stood.

    Python's unpickler makes room for twice the largest number as soon as it reads it: six bytes take 64 GiB.
    """
    begin = file.tell()
    numbers = (argument for code, argument, _ in pickletools.genops(file) if code.name in ("PUT", "LONG_BINPUT"))
    largest = max((int(number) for number in numbers if number is not None), default=0)
    length = file.tell() - begin
    file.seek(begin)
    if largest > length:
        raise CheckpointRefusedError(f"it gives an object the number {largest}, in {length} bytes")


class _Unpickler(pickle.Unpickler):
    """Args: names: what the file may ask for; None for anything (it gets a `Record` either way)."""

    def __init__(self, file: BinaryIO, names: Collection[str] | None) -> None:
        _check_memo(file)
        super().__init__(file, encoding="utf-8")
        self._names = names
        self._records: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _BUILT or full in _DTYPES:
            return _BUILT.get(full) or _DTYPES[full]
        if self._names is not None and full not in self._names:
            raise CheckpointRefusedError(f"it asks for {full}")
        if full not in self._records:
            self._records[full] = _Frozen("Record", (Record,), {"__slots__": (), "name": full})
        return self._records[full]

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(pid)


class _Plain:
    """Plain values from what `_Unpickler` gives: containers made anew, tensors, and `Record` for all else.

    Args:
        storage: gives the bytes of a storage as a tensor of uint8, by its key.
    """

    def __init__(self, storage: Callable[[str], torch.Tensor]) -> None:
        self._storage = storage
        self._made: dict[int, tuple[Any, Any]] = {}
        """By identity, what was made from what, which is held so that no other object gets its identity."""

    def of(self, value: Any) -> Any:
        """`value` as plain values."""
        if type(value) in _LEAVES:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._make(value))
        return self._made[id(value)][1]

    def _make(self, value: Any) -> Any:
        if type(value) in (dict, _Dict):
            return {self.of(key): self.of(part) for key, part in value.items()}
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.of(part) for part in value)
        if isinstance(value, Record) and value.name in _TENSORS:
            return self._tensor(*value.arguments)
        if isinstance(value, Record) and value.name == _PARAMETER:
            return self.of(value.arguments[0])
        if isinstance(value, Record):
            value.state = self.of(value.state)
            value.arguments = self.of(value.arguments)
            return value
        if isinstance(value, type) and issubclass(value, Record):  # a class or function by its name alone
            return value()
        raise CheckpointRefusedError(f"it holds a {type(value).__name__}")

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
        numbers = (offset, *size, *stride)
        if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
            raise CheckpointRefusedError(f"it holds a tensor with offset, size and stride {numbers}")
        # In version 3 the type of the numbers stands behind requires_grad and the hooks.
        elements = self._elements(storage, rest[2] if len(rest) > 2 else None)
        if math.prod(size) > elements.numel():
            raise CheckpointRefusedError(f"it holds a tensor of size {list(size)} in {elements.numel()} numbers")
        return elements.as_strided(tuple(size), tuple(stride), elements.storage_offset() + offset)

    def _elements(self, storage: Any, dtype: Any) -> torch.Tensor:
        """The numbers of a storage; `dtype` is theirs where the storage is one of bytes."""
        if isinstance(storage, Record) and storage.name == _NESTED:
            words, content = _nested_storage(*storage.arguments)
        else:
            words = storage.words
            content = self._storage(words[2])
        kind, storage_type, _, _, count = words[:5]
        name = storage_type.name if issubclass(storage_type, Record) else ""
        dtype = dtype if name == _BYTES else _STORAGES[name]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise CheckpointRefusedError("it holds a tensor of an unknown kind")
        content = content[: count * (1 if name == _BYTES else dtype.itemsize)]
        aligned = content.storage_offset() % dtype.itemsize == 0
        return (content if aligned else content.clone()).view(dtype)


def _nested_storage(content: bytes) -> tuple[tuple[Any, ...], torch.Tensor]:
    """What a persistent id of a storage says, and its bytes, from the form of ``torch.save`` before 1.6.

    A plain pickle of a tensor has its storage so: pickles of a magic number, a version, the machine, the storage and
    the list of its key, then the count of its numbers in eight bytes, and they themselves.
    """
    file = io.BytesIO(content)
    *_, storage, keys = (_Unpickler(file, TENSOR_NAMES).load() for _ in range(5))
    if storage.words[2:3] != tuple(keys):
        raise CheckpointRefusedError("it holds a tensor with the numbers of another")
    numbers = bytearray(content[file.tell() + 8 :])
    return storage.words, torch.frombuffer(numbers, dtype=torch.uint8) if numbers else torch.empty(0, dtype=torch.uint8)


class _Archive:
    """The zip archive of ``torch.save`` in an open file; its entries are stored as they are, never compressed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file)
        names = self._zip.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        programs = [name for name in names if name.endswith("/constants.pkl") or "/code/" in name]
        if programs:
            raise CheckpointRefusedError(f"it is a TorchScript archive, which holds a program ({programs[0]})")
        if len(pickles) != 1:
            raise CheckpointRefusedError(f"it holds {len(pickles)} files data.pkl, and torch.save writes one")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self._size = file.seek(0, io.SEEK_END)
        order = f"{self._prefix}byteorder"
        if order in names and self.read("byteorder") != b"little":
            raise CheckpointRefusedError("its numbers are not in little-endian order")

    def place(self, name: str) -> tuple[int, int]:
        """Where the bytes of an entry begin, and how many they are."""
        entry = self._zip.getinfo(self._prefix + name)
        self._file.seek(entry.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > self._size:
            raise CheckpointRefusedError(f"its entry {entry.filename} is compressed or goes beyond the file's end")
        return start, entry.file_size

    def read(self, name: str) -> bytes:
        """The bytes of a small entry."""
        start, size = self.place(name)
        self._file.seek(start)
        return self._file.read(size)

    def read_tensor(self, name: str) -> torch.Tensor:
        """The bytes of an entry, copied into memory."""
        start, size = self.place(name)
        content = torch.empty(size, dtype=torch.uint8)
        self._file.seek(start)
        view, at = memoryview(content.numpy()), 0
        while at < size:
            count = self._file.readinto(view[at:])
            if not count:
                raise EOFError(f"{name} ends after {at} of {size} bytes")
            at += count
        return content


def read_torch(path: Path, names: Collection[str] | None = TENSOR_NAMES) -> Any:
    """What ``torch.save`` wrote into `path`: plain containers and values, tensors that lie in the file until used.

    Args:
        names: what the file may ask for beside dtypes, OrderedDict, Size and sets; None reads files that ask for
            anything (Megatron-LM saves its whole command line), with a `Record` in the place of each object.

    Raises:
        CheckpointRefusedError: it asks for other things, or is no such file (a program, a pickle of old form).
        CheckpointDamagedError: it is missing or cannot be read.
    """

    def read() -> Any:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            if not zipfile.is_zipfile(file):
                file.seek(0)
                if file.read(4) == b"PK\3\4":
                    raise EOFError("the end of the archive is missing")
                raise CheckpointRefusedError(
                    "it is no zip archive, as torch.save writes since PyTorch 1.6.\n      fix: where the file is whole "
                    "and you trust it, load and save it anew with PyTorch"
                )
            archive = _Archive(file)
            # Private: what is written into these pages is not written into the file.
            whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

            def storage(key: str) -> torch.Tensor:
                start, count = archive.place(f"data/{key}")
                return whole[start : start + count]

            return _Plain(storage).of(_Unpickler(io.BytesIO(archive.read("data.pkl")), names).load())

    return _guarded(path, read)


def read_torch_part(file: Any, path: Path, names: Collection[str] | None = TENSOR_NAMES) -> Any:
    """As `read_torch`, of an open binary file; the tensors are in memory. `path` is named in errors."""

    def read() -> Any:
        archive = _Archive(file)
        content = _Unpickler(io.BytesIO(archive.read("data.pkl")), names).load()
        return _Plain(lambda key: archive.read_tensor(f"data/{key}")).of(content)

    return _guarded(path, read)


def read_pickle(content: BinaryIO, path: Path, names: Collection[str]) -> Any:
    """A plain pickle that may ask for `names`. `path` is named in errors."""

    def no_storage(key: str) -> NoReturn:
        raise CheckpointRefusedError(f"it refers to bytes elsewhere ({key})")

    return _guarded(path, lambda: _Plain(no_storage).of(_Unpickler(content, names).load()))


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except CheckpointRefusedError as error:
        raise CheckpointRefusedError(f"{path}: refused, since it may not be what it should be: {error}") from None
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{path}: missing") from None
    except Exception as error:  # whatever a damaged stream leads pickle, zipfile and the rules above to
        raise CheckpointDamagedError(f"{path}: damaged; {type(error).__name__}: {error}") from None
