"""Hugging Face folder to checkpoint and back: one tensor at a time, proven before the result becomes visible."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.checkpoint.state_files import NativeReader
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.compose.hf_tokenizer import SPECIAL_IDS, add_special_ids, as_list, special_ids
from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.convert.gguf import unpack_gguf
from nemo_llm.convert.hf_files import HfReader, write_safetensors, written_names
from nemo_llm.convert.layer_subset import write_samples
from nemo_llm.convert.logit_check import GateReport, GateSettings, compare, saved_model, their_config
from nemo_llm.convert.mapping import Mapped
from nemo_llm.convert.reach import Reach
from nemo_llm.convert.token_ids import compare_token_ids
from nemo_llm.convert.write_checkpoint import (
    Outcome,
    ahead,
    appear,
    check_room,
    finish_ours,
    gate,
    open_ours,
    progress,
    write_ours,
    write_report,
)
from nemo_llm.data.turn_end import turn_end_id
from nemo_llm.errors import InputError
from nemo_llm.families.registry import FAMILIES, family_for, family_of, hf_config, read_hf_config
from nemo_llm.log import get_logger
from nemo_llm.tokenizers.tokenizer import COMPANIONS, load_tokenizer_from_folder

_log = get_logger(__name__)

_DTYPE_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def hf_to_ours(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> Outcome:
    """A Hugging Face folder, or a GGUF file, becomes a committed checkpoint of weights alone."""
    if source.suffix == ".gguf" and source.is_file():
        with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=f".{output.name}.gguf.") as unpacked:
            unpack_gguf(source, Path(unpacked) / output.name)
            return hf_to_ours(cfg, Path(unpacked) / output.name, temporary, output)
    has_tokenizer = (source / "tokenizer.json").is_file()
    overrides = ["+model=from_hf", f"model.hf_path={source.resolve()}", "precision=fp32"]
    run = compose([*overrides, *([] if has_tokenizer else ["tokenizer=byte"])])
    mapped = Mapped.of(family_of(read_hf_config(source), str(source)), asdict(run.model))
    with HfReader(source, cfg.allow_pickle) as reader:
        mapped.check_theirs(reader.infos, str(source))
        written = write_ours(cfg, mapped, reader, temporary)
    finish_ours(to_dict(run), run.data.tokenizer if has_tokenizer else None, temporary, source)
    if not has_tokenizer:
        add_special_ids(temporary, special_ids(source))
    report = compare_folders(cfg, mapped, (source, temporary), temporary)
    if report is not None and has_tokenizer:
        report = replace(report, texts=compare_token_ids(source, temporary / "tokenizer", beginning=True))
    return written.commit(cfg, mapped, report, output)


def ours_to_hf(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> Outcome:
    """A checkpoint of ours becomes a folder that plain transformers loads."""
    saved = SavedRun.open(source)
    folder, model = saved.folder, asdict(saved_model(saved))
    if cfg.family is not None and cfg.family not in FAMILIES:
        raise InputError(f"family={cfg.family}: not known; known are {', '.join(FAMILIES)}")
    model["family"] = cfg.family or model["family"]
    family = family_for(model)
    mapped = Mapped.of(family, model)
    reader, infos = open_ours(cfg, mapped, folder)
    total = sum(info.num_bytes for info in infos.values())
    shutil.rmtree(temporary / "state", ignore_errors=True)
    check_room(temporary, total)
    began = time.monotonic()
    with progress(total) as bar:
        done = written_names(temporary, infos, cfg.max_shard_mib << 20)
        tensors = ahead(_their_tensors(mapped, reader, done))
        write_safetensors(temporary, infos, _counted(tensors, bar), cfg.max_shard_mib << 20)
    seconds = time.monotonic() - began
    _write_hf_companions(temporary, folder, hf_config(family, model), next(iter(infos.values())).dtype)
    report = compare_folders(cfg, mapped, (temporary, folder), temporary)
    if report is not None and (temporary / "tokenizer_config.json").exists():
        report = replace(report, texts=compare_token_ids(temporary, folder / "tokenizer", beginning=False))
    write_report(temporary, cfg, mapped, report)
    appear(temporary, output)
    return Outcome(output, total, seconds, report)


def _their_tensors(mapped: Mapped, reader: NativeReader, done: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Their tensors in the order of the table; of those in ``done`` shape and type alone."""
    for link in mapped.links:
        if done.issuperset(link.names):
            info = reader.infos[link.key]
            slice_ = torch.empty(info.shape[len(link.index) :], dtype=info.dtype, device="meta")
        else:
            slice_ = reader.read(link.key, link.index)
        yield from zip(link.names, mapped.to_theirs(link, slice_), strict=True)


def _counted(tensors: Iterator[tuple[str, torch.Tensor]], bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        bar.update(tensor.numel() * tensor.element_size())


def _write_hf_companions(target: Path, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """``config.json``, the tokenizer and what else came with it."""
    tokenizer = folder / "tokenizer"
    config["dtype"] = config["torch_dtype"] = _DTYPE_WORDS[dtype]
    if tokenizer.is_dir():
        names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
        for path in sorted(tokenizer.iterdir()):
            if path.name in (*COMPANIONS, "tokenizer.json") or path.name in names:
                shutil.copyfile(path, target / names.get(path.name, path.name))
        if not (target / "tokenizer_config.json").exists():
            _write_tokenizer_config(tokenizer, target)
    ids = _special_ids(folder)
    # null, not absent: some families' defaults are ids that this vocabulary need not have.
    config |= {**dict.fromkeys(SPECIAL_IDS), **ids}
    add_special_ids(target, ids)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _special_ids(folder: Path) -> dict[str, Any]:
    """Ids that generation needs: those that came with the model, else the tokenizer's; a chat's turn ends besides."""
    if not (folder / "tokenizer").is_dir():
        return special_ids(folder)
    loaded = load_tokenizer_from_folder(folder / "tokenizer")
    own = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eod_id}
    ids = {key: value for key, value in own.items() if value is not None} | special_ids(folder / "tokenizer")
    ends = as_list(ids["eos_token_id"])
    turn_end = turn_end_id(loaded)
    if turn_end is not None and turn_end not in ends:
        ids["eos_token_id"] = [*ends, turn_end]
    return ids


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


def compare_folders(cfg: ConvertConfig, mapped: Mapped, folders: tuple[Path, Path], written: Path) -> GateReport | None:
    """The gate between (their folder, ours), of which ``written`` is new."""
    hf, ours = folders

    def run(layers: list[int] | None, settings: GateSettings, scratch: Path) -> GateReport:
        return compare(*(folders if layers is None else write_samples(mapped, hf, ours, layers, scratch)), settings)

    return gate(cfg, mapped, run, written, Reach.of(mapped.model, their_config(hf)))
