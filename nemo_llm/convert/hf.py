"""Hugging Face folder to checkpoint and back: one tensor at a time, proven before the result becomes visible."""

import json
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nemo_llm.checkpoint.folder import TOKENIZER_FOLDER_NAME
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.checkpoint.state_files import NativeReader
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.compose.hf_tokenizer import SPECIAL_IDS, add_special_ids, as_list, special_ids
from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.conversation.turn_end import saved_template, turn_end_id
from nemo_llm.convert.hf_files import HfReader, write_safetensors, written_names
from nemo_llm.convert.layer_subset import write_samples
from nemo_llm.convert.logit_check import GateReport, GateSettings, compare, saved_model, their_config
from nemo_llm.convert.mapping import Mapped
from nemo_llm.convert.reach import Reach
from nemo_llm.convert.write_checkpoint import (
    ConversionOutcome,
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
from nemo_llm.errors import CheckpointError, InputError
from nemo_llm.families.registry import FAMILIES, family_for, family_of, hf_config, read_hf_config
from nemo_llm.log import get_logger
from nemo_llm.tokenizers.tokenizer import copy_companions, load_tokenizer_from_folder

_log = get_logger(__name__)

_TEXTS = (
    "The capital of France is",
    " Two  spaces, a tab\tand a line\nbreak.\n\n",
    "def f(x):\n    return x ** 2 + 1  # 3.14159, 1e-5, 2026-11-29",
    "Ein Käse für 12,50 €; un café à Besançon; Привет, мир; 你好,世界; שלום; 🙂👩‍👩‍👧",
    "x",
    "¿Qué?\r\n\u2028 e\u0301 \u00a0 \ufeff",
)
"""Compared between the tokenizers of both sides."""

_DTYPE_WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def hf_to_ours(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> ConversionOutcome:
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
        report = replace(report, texts=compare_token_ids(source, temporary / TOKENIZER_FOLDER_NAME, beginning=True))
    return written.commit(cfg, mapped, report, output)


def ours_to_hf(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> ConversionOutcome:
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
        report = replace(report, texts=compare_token_ids(temporary, folder / TOKENIZER_FOLDER_NAME, beginning=False))
    write_report(temporary, cfg, mapped, report)
    appear(temporary, output)
    return ConversionOutcome(output, total, seconds, report)


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
    tokenizer = folder / TOKENIZER_FOLDER_NAME
    config["dtype"] = config["torch_dtype"] = _DTYPE_WORDS[dtype]
    if tokenizer.is_dir():
        names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
        for path in sorted(tokenizer.iterdir()):
            if path.name == "tokenizer.json" or path.name in names:
                shutil.copyfile(path, target / names.get(path.name, path.name))
        copy_companions(tokenizer, target)
        if not (target / "tokenizer_config.json").exists():
            _write_tokenizer_config(tokenizer, target)
    ids = _special_ids(folder)
    # null, not absent: some families' defaults are ids that this vocabulary need not have.
    config |= {**dict.fromkeys(SPECIAL_IDS), **ids}
    add_special_ids(target, ids)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _special_ids(folder: Path) -> dict[str, Any]:
    """Ids that generation needs: those that came with the model, else the tokenizer's; a chat's turn ends besides."""
    if not (folder / TOKENIZER_FOLDER_NAME).is_dir():
        return special_ids(folder)
    loaded = load_tokenizer_from_folder(folder / TOKENIZER_FOLDER_NAME)
    own = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eod_id}
    ids = {key: value for key, value in own.items() if value is not None} | special_ids(folder / TOKENIZER_FOLDER_NAME)
    ends = as_list(ids["eos_token_id"])
    turn_end = turn_end_id(loaded, saved_template(loaded))
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


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the model of a ``.gguf`` file, in float32, and its tokenizer to ``folder``.

    The whole model is in memory at this step.

    Raises:
        InputError: packages that are missing, a file that transformers cannot read.
    """
    try:
        import accelerate
        import gguf
    except ImportError as error:
        raise InputError(
            f"{file}: reading GGUF needs the packages gguf and accelerate (extra `gguf`): {error}"
        ) from None
    del accelerate, gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    # In a folder of its own: what lies beside the file (a config.json that names code) has no say.
    with TemporaryDirectory(dir=folder.parent, prefix=".alone.") as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            read = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(alone, **where)
        except (OSError, ValueError, KeyError, NotImplementedError, struct.error) as error:
            raise InputError(f"{file}: transformers cannot read this GGUF file: {error}") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    # A fresh model: the one that was read refuses to be saved, since it came from quantised weights.
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare_token_ids(hf_folder: Path, tokenizer_folder: Path, beginning: bool) -> int:
    """Encode each text with both; returns how many texts were compared: none where transformers cannot load its own.

    Args:
        beginning: compare what stands before a text, too. (What transformers may put behind one is left out: a text to
            continue has no end.)

    Raises:
        CheckpointError: ids differ; names the text and both.
    """
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(hf_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its classes raise for files that they do not take
        _log.warning("%s: transformers cannot load the tokenizer, so that ids are not compared (%s)", hf_folder, error)
        return 0
    ours = load_tokenizer_from_folder(tokenizer_folder)
    start = [] if ours.bos_id is None or not beginning else [ours.bos_id]
    for text in _TEXTS:
        expected = list(theirs(text, add_special_tokens=beginning).input_ids)
        found = [*start, *ours.encode(text)]
        behind = expected[len(found) :]
        if expected[: len(found)] != found or not set(behind) <= set(theirs.all_special_ids):
            raise CheckpointError(
                f"{hf_folder}: the tokenizers differ on {text!r}: transformers {expected[:24]}, here {found[:24]}.\n"
                "      fix: set verify=false to convert all the same; texts would then be read otherwise than by "
                "transformers"
            )
    return len(_TEXTS)
