"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo as files: which kind lies there, its tensors one at a time."""

import argparse
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from nemo_llm.checkpoint.state_files import NativeReader, NativeWriter, TensorInfo
from nemo_llm.checkpoint.unpickle import Record, read_torch
from nemo_llm.config.shipped import completed_model
from nemo_llm.convert.nemo1_ranks import RankFiles
from nemo_llm.errors import InputError
from nemo_llm.families.mcore import arguments_of_fields, fields_of_arguments, fields_of_section, section_of_fields
from nemo_llm.migrate.configs import import_nemo_model
from nemo_llm.migrate.yaml import check_yaml

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron-LM's name for a checkpoint that no training step is counted for."""

_VOCABULARIES = ("embedding.word_embeddings.weight", "output_layer.weight")
# Class names of NeMo 2 and Megatron-Bridge whose models are what their fields say; others add code of their own.
_PLAIN_CLASSES = ("GPT", "Llama", "CodeLlama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Nemotron", "Starcoder2")
_PLAIN_ENDS = re.compile(r"\w*(Config|Provider)\w*")
# Files of a .nemo archive that are read; other artifacts stay in it.
_MEMBERS = re.compile(
    r"\.metadata|metadata\.json|common\.pt|.+\.(ckpt|distcp)|(model|model_config|run_config)\.yaml|"
    r"latest_checkpointed_iteration\.txt|[\w-]*token[\w-]*\.json|vocab\.json|merges\.txt|chat_template\.jinja"
)
_MOST_MEMBERS = 100_000
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "squared_relu": "squared_relu",
    "openai_gelu": "gelu_tanh",
}


class MegatronReader:
    """Tensors by the names that Megatron's modules have, layers and experts numbered, however they were stored.

    Args:
        tensors: a distributed checkpoint, or tensors by name.
        vocab_size: rows of embedding and output that are tokens; the rest is padding and is left out. None: all.
    """

    def __init__(self, tensors: NativeReader | Mapping[str, torch.Tensor], vocab_size: int | None = None) -> None:
        self._tensors, self._vocab_size = tensors, vocab_size
        self._places: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.infos: dict[str, TensorInfo] = {}
        stored = tensors.infos if isinstance(tensors, NativeReader) else _infos(tensors)
        with_experts = any(".mlp.router." in key for key in stored)
        prefix = _prefix(stored)
        for key, info in stored.items():
            if not key.startswith(prefix) or re.search(r"(^|\.)optimizer\.", key):
                continue
            for name, index in _unstacked(key.removeprefix(prefix), info.shape):
                self._add(canonical(name, with_experts), key, index, info)

    def _add(self, name: str, key: str, index: tuple[int, ...], info: TensorInfo) -> None:
        shape = info.shape[len(index) :]
        if name in _VOCABULARIES and self._vocab_size is not None:
            if shape[0] < self._vocab_size:
                raise InputError(
                    f"{name} has {shape[0]} rows, fewer than the {self._vocab_size} tokens of the vocabulary"
                )
            shape = (self._vocab_size, *shape[1:])
        self._places[name] = (key, index)
        self.infos[name] = TensorInfo(shape, info.dtype)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        key, index = self._places[name]
        whole = self._tensors.read(key, index) if isinstance(self._tensors, NativeReader) else self._tensors[key]
        return whole[: self._vocab_size] if name in _VOCABULARIES else whole


def _prefix(names: Iterable[str]) -> str:
    """What stands before every name: nothing, ``module.`` in NeMo 2, ``model.`` or ``model.module.`` in NeMo 1."""
    ends = (name.removesuffix(_VOCABULARIES[0]) for name in names if name.endswith(_VOCABULARIES[0]))
    return next((end for end in ends if "optimizer" not in end), "")


def _infos(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def _unstacked(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, index) of each part of a tensor that may have layers and experts as leading axes."""
    found = re.fullmatch(r"decoder\.layers\.(?!\d)(.+)", key)
    layers = [(f"decoder.layers.{n}.{found[1]}", (n,)) for n in range(shape[0])] if found else [(key, ())]
    for name, index in layers:
        head, experts, tail = name.partition(".mlp.experts.experts.")
        if not experts:
            yield name, index
            continue
        for number in range(shape[len(index)]):
            yield f"{head}.mlp.experts.local_experts.{number}.{tail}", (*index, number)


def canonical(name: str, with_experts: bool) -> str:
    """Names as Transformer Engine's layers have them; Megatron's own layers call norms otherwise."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    inner, outer = ".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."
    return name.replace(inner, outer) if with_experts else name.replace(outer, inner)


@dataclass(frozen=True, slots=True)
class MegatronSource:
    """An opened checkpoint of Megatron's kind.

    Attributes:
        kind: for reports.
        reader: its tensors.
        model: keys of our model section, the vocabulary's size among them.
        fields: Megatron-Core's fields of it.
        tokenizer: a folder of Hugging Face's that lies in it.
    """

    kind: str
    reader: MegatronReader
    model: dict[str, Any]
    fields: dict[str, Any]
    tokenizer: Path | None = None


@contextmanager
def open_megatron(path: Path, vocab_size: int | None, scratch: Path) -> Iterator[MegatronSource]:
    """Open whatever of Megatron's kinds lies at ``path``.

    Args:
        vocab_size: tokens of the tokenizer, for a checkpoint that does not say its own; None takes all rows.
        scratch: a folder in which archives are unpacked while they are open.

    Raises:
        InputError: nothing of these kinds, or a model that is not built here.
        CheckpointDamagedError: a file that cannot be read.
    """
    if path.is_file() and tarfile.is_tarfile(path):
        with TemporaryDirectory(dir=scratch, prefix=f".{path.name}.") as unpacked:
            try:
                _unpack(path, Path(unpacked))
            except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                raise InputError(f"{path}: not readable as an archive: {error}") from None
            yield _open_folder(Path(unpacked), vocab_size, path)
        return
    yield _open_folder(path, vocab_size, path)


def _unpack(path: Path, folder: Path) -> None:
    """Write the files of a ``.nemo`` archive that are read here below `folder`: plain files, by their names.

    Links, devices and owners of the archive are never made, and nothing is written elsewhere.

    Raises:
        InputError: a name that leads out of the folder, or more than the disk has room for.
    """
    room = shutil.disk_usage(folder).free
    with tarfile.open(path) as archive:
        for number, member in enumerate(archive):
            parts = PurePosixPath(member.name).parts
            if PurePosixPath(member.name).is_absolute() or ".." in parts or number >= _MOST_MEMBERS:
                raise InputError(f"{path}: its member {member.name!r} is none of a checkpoint of NeMo: refused")
            if not member.isreg() or not parts or not _MEMBERS.fullmatch(parts[-1]):
                continue
            room -= member.size
            if room < 0:
                raise InputError(f"{path}: unpacked it takes more than the disk of {folder} has free, at {member.name}")
            source = archive.extractfile(member)
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            assert source is not None
            with source, target.open("xb") as file:
                shutil.copyfileobj(source, file, 16 << 20)


def _open_folder(folder: Path, vocab_size: int | None, named: Path) -> MegatronSource:
    if (folder / "model_config.yaml").is_file():
        return _open_nemo1(folder, vocab_size, named)
    if (folder / "context").is_dir() and (folder / "weights").is_dir():
        return _open_nemo2(folder, vocab_size, named)
    step = _newest(folder, named)
    if (step / "run_config.yaml").is_file():
        fields = _fields_of_yaml(step / "run_config.yaml", "model")
        return _source("Megatron-Bridge", NativeReader(step), fields, vocab_size)
    common = read_torch(step / "common.pt", None)
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, Record) or arguments.name != "argparse.Namespace" or type(arguments.state) is not dict:
        raise InputError(f"{step / 'common.pt'}: holds no arguments of Megatron-LM, and there is no run_config.yaml")
    return _source("Megatron-LM", NativeReader(step), fields_of_arguments(arguments.state), vocab_size)


def _newest(folder: Path, named: Path) -> Path:
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / TRACKER
    if tracker.is_file():
        step = tracker.read_text(encoding="utf-8").strip()
        found = folder / (f"iter_{int(step):07d}" if step.isdecimal() else step)
        if (found / ".metadata").is_file():
            return found
        hint = "it holds no distributed checkpoint (torch_dist); Megatron-LM's --ckpt-convert-format writes one"
        raise InputError(f"{found}: named by {tracker.name}, but {hint}")
    raise InputError(
        f"{named}: no checkpoint of Megatron-LM or Megatron-Bridge (a folder iter_* with .metadata, or the folder "
        "above it), of NeMo 2 (context/ and weights/) or of NeMo 1 (a .nemo archive)"
    )


def _open_nemo2(folder: Path, vocab_size: int | None, named: Path) -> MegatronSource:
    path = folder / "context" / "model.yaml"
    if not path.is_file():
        raise InputError(f"{named}: context/model.yaml is missing, which says what the model is")
    fields = _fields_of_yaml(path, "config")
    tokenizer = folder / "context" / "nemo_tokenizer"
    source = _source("NeMo 2", NativeReader(folder / "weights"), fields, vocab_size)
    if not (tokenizer / "tokenizer.json").is_file():
        return source
    return MegatronSource(source.kind, source.reader, source.model, source.fields, tokenizer)


def _fields_of_yaml(path: Path, section: str) -> dict[str, Any]:
    """Fields in a section of Hydra's form, classes and functions by their dotted names."""
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text, str(path))
        fields = yaml.safe_load(text)[section]
        target = str(fields["_target_"]).rpartition(".")[2]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not readable as a model's configuration: {error}") from None
    if not target.startswith(_PLAIN_CLASSES) or not _PLAIN_ENDS.fullmatch(target):
        known = ", ".join(_PLAIN_CLASSES)
        raise InputError(f"{path}: {target} may do more than its fields say; classes that are read begin with {known}")
    function = fields.get("activation_func")
    name = str(function["_target_"] if isinstance(function, Mapping) else function).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise InputError(f"{path}: activation_func={name} is not known; known are {', '.join(_ACTIVATIONS)}")
    fused = fields.get("bias_activation_fusion") and fields.get("add_bias_linear") and not fields["gated_linear_unit"]
    # Megatron's fused kernel of bias and GELU is the tanh approximation.
    activation = "gelu_tanh" if name == "gelu" and fused else _ACTIVATIONS[name]
    return {**fields, "activation_func": activation}


def _open_nemo1(folder: Path, vocab_size: int | None, named: Path) -> MegatronSource:
    model = completed_model(import_nemo_model(folder / "model_config.yaml"))
    states = [path.parent for path in folder.rglob(".metadata")]
    single = folder / "model_weights.ckpt"
    if states:
        tensors: Any = NativeReader(states[0])
    elif single.is_file():
        tensors = _tensors_by_name(single)
    else:
        tensors = RankFiles(folder, model["num_layers"], model["gated_linear_unit"])
    keys = tensors.infos if states else tensors
    if not any(key.startswith("model.decoder.") for key in keys):
        raise InputError(f"{named}: its tensors are not named as Megatron-Core names them (model.decoder...): too old")
    return _source("NeMo 1", tensors, None, vocab_size, model)


def _tensors_by_name(path: Path) -> dict[str, torch.Tensor]:
    content = read_torch(path, None)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, and weights are tensors by name")
    return {name: part for name, part in content.items() if isinstance(name, str) and isinstance(part, torch.Tensor)}


def _source(
    kind: str, tensors: Any, fields: dict[str, Any] | None, vocab_size: int | None, model: Any = None
) -> MegatronSource:
    section: dict[str, Any] = model if fields is None else section_of_fields(fields, kind)
    probe = MegatronReader(tensors)
    if _VOCABULARIES[0] not in probe.infos:
        raise InputError(f"{kind}: the checkpoint has no {_VOCABULARIES[0]}: its tensors have other names")
    rows = probe.infos[_VOCABULARIES[0]].shape[0]
    said = None if fields is None else fields.get("vocab_size")
    section = {**section, "vocab_size": said if said and said <= rows else vocab_size or rows}
    reader = MegatronReader(tensors, section["vocab_size"])
    return MegatronSource(kind, reader, section, fields or fields_of_section(section))


def write_megatron(folder: Path, model: Mapping[str, Any], tensors: Any) -> None:
    """Write ``folder`` as Megatron-LM's ``--save`` has it, with arguments for its ``--use-checkpoint-args``.

    Args:
        tensors: (key, index, axes, slice) of every tensor.
    """
    fields = fields_of_section(model)
    arguments = arguments_of_fields(fields)
    step = folder / RELEASE
    step.mkdir(parents=True)
    rows = 0
    with NativeWriter(step) as writer:
        for key, index, axes, slice_ in tensors:
            writer.write(key, index, axes, slice_)
            rows = slice_.shape[0] if key == _VOCABULARIES[0] else rows
    arguments["padded_vocab_size"] = rows
    common = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}
    torch.save(common, step / "common.pt")
    (folder / TRACKER).write_text(RELEASE, encoding="utf-8")
