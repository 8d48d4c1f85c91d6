"""Files that would run a command, write a file or read outside of their folder, if a reader believed them.

Each maker takes the folder of a sound checkpoint's copy (or an empty folder) and the path of a marker, which is there
afterwards only if something of the file was run.
"""

import io
import json
import os
import pickle
import tarfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_llm.checkpoint.manifest import COMPLETE, manifest_digest, write_manifest

NEMO1_CONFIG = (
    "num_layers: 2\nhidden_size: 32\nffn_hidden_size: 64\nnum_attention_heads: 4\nmax_position_embeddings: 64\n"
    "encoder_seq_length: 64\nmegatron_amp_O2: true\nmcore_gpt: true\n"
)
SCRIPT = """
import sys
import torch
from typing import Tuple

class Writes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.ones(2)
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return (self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]):
        made = torch.from_file("MARKER", True, 64, dtype=torch.uint8)
        made.fill_(65)
        self.w = made
        self.training = state[1]

    def forward(self, x):
        return x

torch.jit.save(torch.jit.script(Writes()), sys.argv[1])
"""


class Touch:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def saved(content: Any, **settings: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def seal(step: Path) -> None:
    """Make the hashes of a checkpoint those of its files, as whoever changes them can."""
    for name in (COMPLETE, "manifest.json"):
        (step / name).unlink(missing_ok=True)
    write_manifest(step, {})
    (step / COMPLETE).write_text(manifest_digest(step) + "\n")


def _metadata(step: Path, change: Callable[[Any], Any]) -> None:
    path = step / "state" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    changed = change(metadata)
    path.write_bytes(pickle.dumps(metadata) if changed is None else changed)


def _objects(metadata: Any) -> set[str]:
    return {name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}


def _move_objects(step: Path, payload: bytes, name: str, offset: int = 0) -> None:
    """All stored objects lie in one file, by the name that `name` gives it."""
    (step / "state" / "evil.distcp").write_bytes(payload)
    (step / "evil.distcp").write_bytes(payload)

    def change(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn in _objects(metadata):
                place.relative_path, place.offset, place.length = name, offset, len(payload)

    _metadata(step, change)


def _patched_class(step: Path, marker: Path) -> None:
    """Places of objects come from a defaultdict of a class whose attributes the pickle has set."""
    payload = saved(Touch(marker))
    (step / "state" / "evil.distcp").write_bytes(payload)

    def change(metadata: Any) -> bytes:
        objects = _objects(metadata)
        kept = {index: place for index, place in metadata.storage_data.items() if index.fqn not in objects}
        metadata.storage_data = defaultdict(PosixPath, kept)
        fields = b"(Vrelative_path\nVevil.distcp\nVoffset\nI0\nVlength\nI%d\nVtransform_descriptors\nN" % len(payload)
        return b"\x80\x02cpathlib\nPosixPath\nN}" + fields + b"u\x86b0" + pickle.dumps(metadata, protocol=2)[2:]

    _metadata(step, change)


def _pickle(content: bytes) -> Callable[[Path, Path], None]:
    """``.metadata`` of these bytes, ``MARKER`` in them replaced by a command that makes the marker."""

    def make(step: Path, marker: Path) -> None:
        command = f"touch '{marker}'".encode()
        (step / "state" / ".metadata").write_bytes(content.replace(b"COMMAND", command))

    return make


def _set_on_class(step: Path, marker: Path) -> None:
    """The constructor of PyTorch's own class becomes another function, then sound content follows."""
    del marker

    def change(metadata: Any) -> bytes:
        patch = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\nN}V__init__\ncbuiltins\nprint\ns\x86b0"
        return b"\x80\x02" + patch + pickle.dumps(metadata, protocol=2)[2:]

    _metadata(step, change)


def _file(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def make(step: Path, marker: Path) -> None:
        (step / name).write_bytes(content(marker))

    return make


def _objects_are(content: Callable[[Path], bytes], name: str = "evil.distcp", offset: int = 0) -> Any:
    return lambda step, marker: _move_objects(step, content(marker), name.replace("STEP", str(step)), offset)


def _tensors_are_payloads(step: Path, marker: Path) -> None:
    payload = saved(Touch(marker))
    for file in (step / "state").glob("*.distcp"):
        whole = file.read_bytes()
        file.write_bytes(payload + whole[len(payload) :])

    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(payload)

    _metadata(step, change)


def _bytes_of(content: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


class _Nested:
    """A tensor's storage whose bytes are a payload."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (saved(Touch(self.marker)),)


def _doubled(depth: int) -> Any:
    content: Any = ()
    for _ in range(depth):
        content = (content, content)
    return content


def _script(marker: Path) -> bytes:
    return (marker.parent / "script.pt").read_bytes()


# Of a checkpoint of this project: name, maker.
OURS: dict[str, Callable[[Path, Path], None]] = {
    "metadata calls os.system": lambda step, marker: (
        (step / "state" / ".metadata").write_bytes(pickle.dumps(Touch(marker))) and None
    ),
    "metadata patches a class": _patched_class,
    "metadata sets on a class": _set_on_class,
    "metadata by INST": _pickle(b"(VCOMMAND\nios\nsystem\n."),
    "metadata by OBJ": _pickle(b"(cos\nsystem\nVCOMMAND\no."),
    "metadata by getattr": _pickle(b"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR(VCOMMAND\ntR."),
    "metadata by numpy": _pickle(b'cnumpy.testing._private.utils\nrunstring\n(Vimport os; os.system("COMMAND")\n}tR.'),
    "metadata nests deeply": _pickle(b"(" + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "metadata doubles": _file("state/.metadata", lambda marker: pickle.dumps(_doubled(60))),
    "metadata leaves objects without a place": lambda step, marker: _metadata(
        step,
        lambda metadata: (
            [
                metadata.storage_data.pop(index)
                for index in list(metadata.storage_data)
                if index.fqn in _objects(metadata)
            ]
            and None
        ),
    ),
    "object calls os.system": _objects_are(lambda marker: saved(Touch(marker))),
    "object lies above": _objects_are(lambda marker: saved([None]), "../evil.distcp"),
    "object lies at an absolute path": _objects_are(lambda marker: saved([None]), "STEP/evil.distcp"),
    "object lies behind the end": _objects_are(lambda marker: saved([None]), offset=10_000),
    "object is TorchScript": _objects_are(_script),
    "object is a pickle in bytes": _objects_are(lambda marker: saved(_bytes_of(Touch(marker)))),
    "object is a pickle in bytes in bytes": _objects_are(
        lambda marker: saved(_bytes_of({"scale_fwd": _Nested(marker), "recipe": None}))
    ),
    "object is of a class that Megatron allows": _objects_are(lambda marker: saved(io.BytesIO(b"x"))),
    "common.pt calls os.system": _file("state/common.pt", lambda marker: saved(Touch(marker))),
    "common.pt of old form": _file(
        "state/common.pt", lambda marker: saved(Touch(marker), _use_new_zipfile_serialization=False)
    ),
    "common.pt is TorchScript": _file("state/common.pt", _script),
    "common.pt is a plain pickle": _file("state/common.pt", lambda marker: pickle.dumps(Touch(marker))),
    "common.pt patches OrderedDict": _file(
        "state/common.pt", lambda marker: saved({"x": OrderedDict(a=Touch(marker))})
    ),
    "tensors call os.system": _tensors_are_payloads,
}


def tokenizer_of_nemo(step: Path, arguments: dict[str, Any], marker: Path, nemo_class: str = "AutoTokenizer") -> None:
    """The checkpoint's tokenizer is one of NeMo's, with Python beside it."""
    folder = step / "tokenizer"
    description = json.loads((folder / "nemo_llm_tokenizer.json").read_text())
    description.update(type="nemo", nemo_class=nemo_class, nemo_args=arguments, path=None)
    (folder / "nemo_llm_tokenizer.json").write_text(json.dumps(description))
    remote_code(folder / "hf", marker)


def remote_code(folder: Path, marker: Path) -> None:
    """A tokenizer and a model of transformers that are Python files of the folder."""
    folder.mkdir(exist_ok=True)
    names = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": names}))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nclass Evil: pass\n")


TOKENIZERS: dict[str, Callable[[Path, Path], None]] = {
    "tokenizer trusts remote code": lambda step, marker: tokenizer_of_nemo(
        step, {"pretrained_model_name": "hf", "trust_remote_code": True}, marker
    ),
    "tokenizer asks whether to trust": lambda step, marker: tokenizer_of_nemo(
        step, {"pretrained_model_name": "hf"}, marker
    ),
    "tokenizer of another class": lambda step, marker: tokenizer_of_nemo(step, {}, marker, "TokenizerSpec"),
    "tokenizer of a module": lambda step, marker: tokenizer_of_nemo(step, {}, marker, "huggingface"),
    "tokenizer lies elsewhere": lambda step, marker: tokenizer_of_nemo(step, {"pretrained_model_name": "/etc"}, marker),
}


def megatron_lm(folder: Path, step: Path, common: bytes) -> None:
    """A checkpoint of Megatron-LM with this common.pt."""
    (folder / ".metadata").write_bytes((step / "state" / ".metadata").read_bytes())
    for file in (step / "state").glob("*.distcp"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "common.pt").write_bytes(common)


MEGATRON: dict[str, Callable[[Path], bytes]] = {
    "common.pt of Megatron-LM is TorchScript": _script,
    "common.pt of Megatron-LM holds a payload": lambda marker: saved({"args": Namespace(x=Touch(marker))}),
    "common.pt of Megatron-LM is a payload": lambda marker: saved(Touch(marker)),
    "common.pt of Megatron-LM of old form": lambda marker: saved(
        {"args": Namespace(x=Touch(marker))}, _use_new_zipfile_serialization=False
    ),
}


def _member(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def _chain() -> list[tuple[tarfile.TarInfo, bytes]]:
    """Links whose resolved path is longer than the system takes, so that a filter that resolves them gives up."""
    members, path, long = [], "", "d" * 247
    steps = "abcdefghijklmnop"
    for step in steps:
        members.append(_member(os.path.join(path, long), b"", type=tarfile.DIRTYPE, mode=0o755))
        members.append(_member(os.path.join(path, step), b"", type=tarfile.SYMTYPE, linkname=long))
        path = os.path.join(path, long)
    last = os.path.join("/".join(steps), "l" * 254)
    members.append(_member(last, b"", type=tarfile.SYMTYPE, linkname="../" * len(steps)))
    members.append(_member("escape", b"", type=tarfile.SYMTYPE, linkname=f"{last}/.."))
    return [*members, _member("escape/common.pt")]


def archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """A .nemo archive of these members behind a sound configuration."""
    with tarfile.open(path, "w") as file:
        own = any(info.name == "model_config.yaml" for info, _ in members)
        for info, content in [*([] if own else [_member("model_config.yaml", NEMO1_CONFIG.encode())]), *members]:
            if info.size > len(content):  # says more than there is
                file.fileobj.write(info.tobuf())  # type: ignore[union-attr]
            else:
                file.addfile(info, io.BytesIO(content))


NEMO: dict[str, Callable[[Path], list[tuple[tarfile.TarInfo, bytes]]]] = {
    ".nemo with TorchScript": lambda marker: [_member("model_weights.ckpt", _script(marker))],
    ".nemo with a payload": lambda marker: [_member("model_weights.ckpt", saved({"model.x": Touch(marker)}))],
    ".nemo with a payload of a rank": lambda marker: [_member("mp_rank_00/model_weights.ckpt", saved(Touch(marker)))],
    ".nemo with a YAML tag": lambda marker: [
        _member("model_config.yaml", f"!!python/object/apply:os.system ['touch {marker}']\n".encode())
    ],
    ".nemo writes above": lambda marker: [_member("../common.pt")],
    ".nemo writes above through a folder": lambda marker: [_member("a/../../common.pt")],
    ".nemo writes to an absolute path": lambda marker: [_member(str(marker.parent / "common.pt"))],
    ".nemo writes through a link": lambda marker: [
        _member("l", b"", type=tarfile.SYMTYPE, linkname=str(marker.parent)),
        _member("l/common.pt"),
    ],
    ".nemo writes through a hard link": lambda marker: [
        _member("common.pt", b"", type=tarfile.LNKTYPE, linkname=str(marker.parent / "secret")),
        _member("common.pt"),
    ],
    ".nemo writes through a chain of links": lambda marker: _chain(),
    ".nemo makes a device": lambda marker: [_member("common.pt", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    ".nemo is larger than the disk": lambda marker: [_member("model_weights.ckpt", b"", size=1 << 60)],
}

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system('touch \"MARKER\"') }}",
    "{{ lipsum.__globals__['os'].system('touch \"MARKER\"') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ examples.append(1) }}",
]
