"""The readers of pickled files against ``torch.load``, on what they accept; hostile ones: tests/attack."""

import io
import pickle
import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_llm.checkpoint.manifest import read_manifest
from nemo_llm.checkpoint.new_tokens import new_tokens
from nemo_llm.checkpoint.safe_load import FilePart, read_metadata, stored_object
from nemo_llm.checkpoint.unpickle import TENSOR_NAMES, Record, read_pickle, read_torch, read_torch_part
from nemo_llm.errors import CheckpointDamagedError, CheckpointRefusedError
from nemo_llm.peft.state import read_description

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
]  # fmt: skip


def _drawn(generator: random.Random, depth: int = 0) -> Any:
    """Plain values and tensors, views and shared ones among them."""
    kind = generator.choice(
        ["number", "text", "none", "tensor", "view", "parameter", "dict", "list", "tuple", "ordered"]
    )
    if depth < 3 and kind in ("dict", "ordered"):
        made = {f"k{n}": _drawn(generator, depth + 1) for n in range(generator.randint(0, 4))}
        return OrderedDict(made) if kind == "ordered" else made
    if depth < 3 and kind in ("list", "tuple"):
        made_list = [_drawn(generator, depth + 1) for _ in range(generator.randint(0, 4))]
        return made_list if kind == "list" else tuple(made_list)
    shape = [generator.randint(0, 4) for _ in range(generator.randint(0, 3))]
    if kind == "tensor":
        return torch.randint(0, 2, shape).to(generator.choice(DTYPES))
    if kind == "view":
        return torch.arange(60.0).view(3, 4, 5)[generator.randint(0, 2), :, 1:3].t()
    if kind == "parameter":
        return torch.nn.Parameter(torch.randn(shape), requires_grad=generator.random() < 0.5)
    return {"number": generator.choice([1, -(1 << 70), 0.5, True]), "text": "é"}.get(kind)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
        bits = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)]
        return same and torch.equal(*bits)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(_equal(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("seed", range(20))
def test_files_of_tensors_are_read_as_pytorch_reads_them(tmp_path: Path, seed: int) -> None:
    content = {str(n): _drawn(random.Random(100 * seed + n)) for n in range(6)}
    path = tmp_path / "file.pt"
    torch.save(content, path)
    theirs = torch.load(path, weights_only=True)
    assert _equal(read_torch(path), theirs)
    with path.open("rb", buffering=0) as file:
        assert _equal(read_torch_part(FilePart(file.fileno(), 0, path.stat().st_size), path), theirs)
    ours = read_pickle(io.BytesIO(pickle.dumps(content)), path, {*TENSOR_NAMES, "torch.storage._load_from_bytes"})
    assert _equal(ours, theirs)


def test_what_is_read_is_not_written_back(tmp_path: Path) -> None:
    torch.save(torch.zeros(4), tmp_path / "file.pt")
    read_torch(tmp_path / "file.pt").fill_(1)
    assert not torch.load(tmp_path / "file.pt").any()


def test_objects_are_records_of_what_the_file_says(tmp_path: Path) -> None:
    torch.save({"args": Namespace(a=1, dtype=torch.bfloat16, path=Path("x")), "w": torch.ones(2)}, tmp_path / "file.pt")
    read = read_torch(tmp_path / "file.pt", None)
    assert read["args"].name == "argparse.Namespace"
    assert read["args"].state["a"] == 1
    assert read["args"].state["dtype"] is torch.bfloat16
    assert isinstance(read["args"].state["path"], Record)
    assert torch.equal(read["w"], torch.ones(2))
    with pytest.raises(CheckpointRefusedError, match=r"asks for argparse\.Namespace"):
        read_torch(tmp_path / "file.pt")


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -30])
def test_damaged_files_are_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file.pt"
    torch.save({"w": torch.ones(200)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((CheckpointDamagedError, CheckpointRefusedError), match=r"file\.pt"):
        read_torch(path)


@pytest.mark.parametrize("put", [b"r" + (2**31).to_bytes(4, "little"), b"p2147483648\n"], ids=["binary", "text"])
def test_a_number_beyond_the_file_takes_no_memory(put: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefusedError, match="the number 2147483648"):
        read_pickle(io.BytesIO(b"\x80\x02N" + put + b"."), tmp_path / "common.pt", set())


def test_a_tensor_that_repeats_numbers_is_refused(tmp_path: Path) -> None:
    """It would take more memory than the file has bytes."""
    torch.save(torch.ones(1).expand(1 << 40), tmp_path / "file.pt")
    with pytest.raises(CheckpointRefusedError, match="in 1 numbers"):
        read_torch(tmp_path / "file.pt")


def test_scales_of_transformer_engine_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It unpickles what it is given: tensors of known names are handed over, its own objects are not."""
    recipe = types.ModuleType("transformer_engine.common.recipe")
    scaling = type("DelayedScaling", (), {"__module__": recipe.__name__})
    recipe.DelayedScaling = scaling  # type: ignore[attr-defined]
    scales = {"scale_fwd": torch.tensor([2.0, 4.0, 8.0]), "amax_history_bwd": torch.rand(16, 2)}
    content = {**scales, "recipe": scaling(), "extra_fp8_variables": {"fp8_checkpoint": True}}
    with monkeypatch.context() as installed:
        for name in ("transformer_engine", "transformer_engine.common", recipe.__name__):
            installed.setitem(sys.modules, name, recipe)
        stored = torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)
    torch.save(stored, tmp_path / "file.distcp")
    place: Any = Namespace(relative_path="file.distcp", offset=0, length=(tmp_path / "file.distcp").stat().st_size)
    made = pickle.loads(stored_object(tmp_path, "x._extra_state", place).numpy().tobytes())
    assert made.keys() == {*scales, "extra_fp8_variables"}
    assert all(torch.equal(made[name], tensor) for name, tensor in scales.items())


def test_metadata_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in ([], {}, None, 3, "text", ({},), {"state_dict_metadata": {}}):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointRefusedError, match=r"\.metadata: refused"):
            read_metadata(tmp_path)


@pytest.mark.parametrize("read", [new_tokens, read_description, read_manifest])
@pytest.mark.parametrize("text", ["[" * 100_000, "5", "{"], ids=["deep", "number", "cut"])
def test_small_files_of_a_checkpoint_that_are_damaged_are_named(read: Any, text: str, tmp_path: Path) -> None:
    for name in ("new_tokens.json", "adapter.json", "manifest.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointDamagedError, match=r"\.json: damaged"):
        read(tmp_path)
