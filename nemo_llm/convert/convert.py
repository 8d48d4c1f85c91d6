"""Hugging Face folder to checkpoint and back: one tensor at a time, proven before the result becomes visible."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from tqdm import tqdm

from nemo_llm.checkpoint.folder import begin, commit, resolve_checkpoint
from nemo_llm.config.convert_tool import ConvertConfig
from nemo_llm.config.derived import as_hydra
from nemo_llm.config.load import compose, to_dict
from nemo_llm.convert.gate import GateReport, GateSettings, compare, saved_model
from nemo_llm.convert.gguf import unpack_gguf
from nemo_llm.convert.hf_files import HfReader, TensorInfo, write_safetensors
from nemo_llm.convert.mapping import Mapped
from nemo_llm.convert.native_files import NativeReader, NativeWriter
from nemo_llm.convert.sample import choose_layers, write_samples
from nemo_llm.data.tokenizer import COMPANIONS, load_tokenizer, load_tokenizer_from_folder
from nemo_llm.errors import InputError
from nemo_llm.families.registry import FAMILIES, family_for, family_of, hf_config, read_hf_config
from nemo_llm.log import get_logger

_log = get_logger(__name__)

REPORT_NAME = "conversion.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SPARE_BYTES = 64 << 20
_MEMORY_SHARE = 0.6  # the rest is for activations, logits and others on the machine
_SAMPLED_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a conversion did."""

    output: Path
    num_bytes: int
    seconds: float
    gate: GateReport | None


def convert(cfg: ConvertConfig) -> Outcome:
    """Convert as asked; the output folder appears when everything in it is written and compared.

    Raises:
        InputError: an input that cannot be converted, an output that exists.
        CheckpointError: a damaged checkpoint, or models whose logits differ.
    """
    source, output = Path(cfg.input).expanduser(), Path(cfg.output).expanduser()
    if output.exists() and not cfg.overwrite:
        raise InputError(f"output={output}: exists already; name another folder, or give overwrite=true")
    if output.exists() and output.resolve() == source.resolve():
        raise InputError(f"output={output}: is the input as well")
    ways = {("hf", "nemo_llm"): hf_to_ours, ("nemo_llm", "hf"): ours_to_hf}
    way = ways.get((cfg.source_format, cfg.target_format))
    if way is None:
        known = ", ".join(f"{first} to {second}" for first, second in ways)
        raise InputError(f"{cfg.source_format} to {cfg.target_format}: no such conversion; there are {known}")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = begin(output)
    try:
        return way(cfg, source, temporary, output)
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hf_to_ours(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> Outcome:
    """A Hugging Face folder, or a GGUF file, becomes a committed checkpoint of weights alone."""
    if source.suffix == ".gguf" and source.is_file():
        with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=f".{output.name}.gguf.") as unpacked:
            unpack_gguf(source, Path(unpacked) / output.name)
            return hf_to_ours(cfg, Path(unpacked) / output.name, temporary, output)
    has_tokenizer = (source / "tokenizer.json").is_file()
    overrides = ["+model=from_hf", f"model.hf_path={as_hydra(str(source.resolve()))}", "precision=fp32"]
    run = compose([*overrides, *([] if has_tokenizer else ["tokenizer=byte"])])
    model = to_dict(run)["model"]
    mapped = Mapped.of(family_of(read_hf_config(source), str(source)), model)
    began = time.monotonic()
    with HfReader(source, cfg.allow_pickle) as reader:
        mapped.check_theirs(reader.infos, str(source))
        wanted = _DTYPES[cfg.dtype] if cfg.dtype else None
        total = sum(_size(reader.infos[name], wanted) for link in mapped.links for name in link.names)
        _check_room(temporary, total)
        with NativeWriter(temporary / "state") as writer, _progress(total) as bar:
            for link in mapped.links:
                slice_ = mapped.to_ours(link, [reader.read(name) for name in link.names])
                slice_ = slice_ if wanted is None else slice_.to(wanted)
                writer.write(link.key, link.index, link.axes, slice_)
                bar.update(slice_.numel() * slice_.element_size())
    seconds = time.monotonic() - began
    _write_yaml(temporary / "config.yaml", to_dict(run))
    if has_tokenizer:
        load_tokenizer(run.data.tokenizer).save(temporary / "tokenizer")
    else:
        _log.warning("%s has no tokenizer.json: the checkpoint gets no tokenizer", source)
    gate = _gate(cfg, mapped, (source, temporary), temporary)
    _write_report(temporary, cfg, mapped, gate)
    commit(temporary, output, writer.entries)
    return Outcome(output, total, seconds, gate)


def ours_to_hf(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> Outcome:
    """A checkpoint of ours becomes a folder that plain transformers loads."""
    folder = resolve_checkpoint(source)
    model = saved_model(folder)
    if cfg.family is not None and cfg.family not in FAMILIES:
        raise InputError(f"family={cfg.family}: not known; known are {', '.join(FAMILIES)}")
    model["family"] = cfg.family or model.get("family")
    family = family_for(model)
    mapped = Mapped.of(family, model)
    reader = NativeReader(folder / "state")
    mapped.check_ours(reader.infos, str(folder))
    wanted = _DTYPES[cfg.dtype] if cfg.dtype else None
    infos = mapped.their_infos({key: wanted or info.dtype for key, info in reader.infos.items()})
    total = sum(info.num_bytes for info in infos.values())
    shutil.rmtree(temporary / "state")
    _check_room(temporary, total)
    began = time.monotonic()
    with _progress(total) as bar:
        write_safetensors(temporary, infos, _their_tensors(mapped, reader, bar), cfg.max_shard_mib << 20)
    seconds = time.monotonic() - began
    _write_hf_companions(temporary, folder, hf_config(family, model), next(iter(infos.values())).dtype)
    gate = _gate(cfg, mapped, (temporary, folder), temporary)
    _write_report(temporary, cfg, mapped, gate)
    if output.exists():
        shutil.rmtree(output)
    temporary.rename(output)
    return Outcome(output, total, seconds, gate)


def _their_tensors(mapped: Mapped, reader: NativeReader, bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for link in mapped.links:
        parts = mapped.to_theirs(link, reader.read(link.key, link.index))
        for name, part in zip(link.names, parts, strict=True):
            yield name, part
            bar.update(part.numel() * part.element_size())


def _write_hf_companions(target: Path, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """``config.json``, the tokenizer and what else came with it."""
    tokenizer = folder / "tokenizer"
    # null, not absent: some families' defaults are ids that this vocabulary need not have.
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config["dtype"] = config["torch_dtype"] = _DTYPE_WORDS[dtype]
    if tokenizer.is_dir():
        config.update(_special_ids(tokenizer))
        names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
        for path in sorted(tokenizer.iterdir()):
            if path.name in (*COMPANIONS, "tokenizer.json") or path.name in names:
                shutil.copyfile(path, target / names.get(path.name, path.name))
        if not (target / "tokenizer_config.json").exists():
            _write_tokenizer_config(tokenizer, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _special_ids(tokenizer: Path) -> dict[str, Any]:
    """Ids that generation needs, as the generation config that came with the tokenizer has them."""
    path = tokenizer / "generation_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    loaded = load_tokenizer_from_folder(tokenizer)
    return {"eos_token_id": loaded.eod_id, "bos_token_id": loaded.bos_id}


def _write_tokenizer_config(tokenizer: Path, target: Path) -> None:
    """For tokenizers that never had one: which class reads the files, and the token that ends a text."""
    loaded = load_tokenizer_from_folder(tokenizer)
    gpt2 = (target / "merges.txt").exists()
    if not gpt2 and not (target / "tokenizer.json").exists():
        _log.warning("the checkpoint's tokenizer has no form that Hugging Face reads: the folder gets none")
        return
    config = {"tokenizer_class": "GPT2TokenizerFast" if gpt2 else "PreTrainedTokenizerFast"}
    config |= {key: loaded.decode([loaded.eod_id]) for key in ("eos_token", "pad_token")}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _gate(cfg: ConvertConfig, mapped: Mapped, folders: tuple[Path, Path], written: Path) -> GateReport | None:
    """Compare (their folder, ours), whole or a sample of their layers."""
    if not cfg.verify:
        return None
    settings = GateSettings(cfg.verify_tokens, cfg.tolerance, cfg.layer_by_layer)
    hf, ours = folders
    count = cfg.verify_layers or _layers_that_fit(mapped)
    if count >= mapped.model["num_layers"]:
        report = compare(hf, ours, settings)
    else:
        layers = choose_layers(mapped.model, count)
        with tempfile.TemporaryDirectory(dir=written.parent, prefix=f"{written.name}.gate.") as sampled:
            report = compare(*write_samples(mapped, hf, ours, layers, Path(sampled)), settings)
        report = replace(report, sampled_layers=layers)
    report.raise_if_different(f"{written.name}: removed")
    return report


def _layers_that_fit(mapped: Mapped) -> int:
    """All layers, or a sample where the model in float32 would take most of the free memory."""
    elements = sum(math.prod(shape) for shape in mapped.our_shapes().values())
    fits = 4 * elements < _MEMORY_SHARE * psutil.virtual_memory().available
    return mapped.model["num_layers"] if fits else _SAMPLED_LAYERS


def _write_report(folder: Path, cfg: ConvertConfig, mapped: Mapped, gate: GateReport | None) -> None:
    content = {
        "source_format": cfg.source_format,
        "target_format": cfg.target_format,
        "family": mapped.family.model_type,
        "tensors": len(mapped.links),
        "gate": None if gate is None else asdict(gate),
    }
    (folder / REPORT_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise InputError(
            f"{folder.parent}: the result takes {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB free"
        )


def _size(info: TensorInfo, dtype: torch.dtype | None) -> int:
    return info.num_bytes if dtype is None else TensorInfo(info.shape, dtype).num_bytes


def _progress(total: int) -> Any:
    return tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None, leave=False)
