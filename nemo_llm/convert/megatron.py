"""Megatron-LM's, Megatron-Bridge's and NeMo's checkpoints to ours; ours to Megatron-LM's."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.folder import copy_tokenizer
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.checkpoint.state_files import NativeReader
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.compose.from_folder import hf_tokenizer
from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.config.shipped import completed_model
from nemo_llm.convert.layer_subset import write_our_sample
from nemo_llm.convert.logit_check import GateReport, GateSettings, Sides, compare_sides, run_ours, saved_model
from nemo_llm.convert.mapping import Mapped
from nemo_llm.convert.megatron_files import MegatronSource, open_megatron, write_megatron
from nemo_llm.convert.megatron_model import run_megatron
from nemo_llm.convert.reach import Reach
from nemo_llm.convert.write_checkpoint import (
    ConversionOutcome,
    appear,
    check_room,
    finish_ours,
    gate,
    open_ours,
    progress,
    wanted_dtype,
    write_ours,
    write_report,
)
from nemo_llm.errors import InputError
from nemo_llm.families.mcore import LOCAL_NAMES, MCORE, fields_of_section
from nemo_llm.tokenizers.tokenizer import load_tokenizer


def megatron_to_ours(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> ConversionOutcome:
    """A checkpoint of Megatron's kind becomes a committed checkpoint of weights alone."""
    given = None if cfg.tokenizer is None else Path(cfg.tokenizer).expanduser()
    if given is not None and not (given / "tokenizer.json").is_file():
        raise InputError(f"tokenizer={given}: holds no tokenizer.json; name a folder with a Hugging Face tokenizer")
    with open_megatron(
        source, None if given is None else load_tokenizer(hf_tokenizer(given)).vocab_size, temporary.parent
    ) as opened:
        tokenizer = given or opened.tokenizer
        section = {"name": source.name.partition(".")[0] or "imported", **opened.model}
        run = compose(["precision=fp32", "tokenizer=byte"], model=completed_model(section))
        if tokenizer is not None:
            run = replace(run, data=replace(run.data, tokenizer=hf_tokenizer(tokenizer)))
        mapped = Mapped.of(MCORE, asdict(run.model))
        mapped.check_theirs(opened.reader.infos, str(source))
        written = write_ours(cfg, mapped, opened.reader, temporary)
        finish_ours(to_dict(run), run.data.tokenizer if tokenizer else None, temporary, source)
        report = _compare(cfg, mapped, opened, temporary, temporary)
    return written.commit(cfg, mapped, report, output)


def ours_to_megatron(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> ConversionOutcome:
    """A checkpoint of ours becomes a folder that Megatron-LM's ``--load`` takes."""
    saved = SavedRun.open(source)
    folder, model = saved.folder, asdict(saved_model(saved))
    fields_of_section(model)  # refuses what Megatron-Core cannot build
    mapped = Mapped.of(MCORE, model)
    reader, infos = open_ours(cfg, mapped, folder)
    total = sum(info.num_bytes for info in infos.values())
    check_room(temporary, total)
    for left in temporary.iterdir():  # one that was killed begins anew
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    began = time.monotonic()
    with progress(total) as bar:
        write_megatron(temporary, model, _slices(mapped, reader, wanted_dtype(cfg), bar))
    seconds = time.monotonic() - began
    copy_tokenizer(folder, temporary)
    with open_megatron(temporary, None, temporary.parent) as opened:
        report = _compare(cfg, mapped, opened, folder, temporary)
    write_report(temporary, cfg, mapped, report)
    appear(temporary, output)
    return ConversionOutcome(output, total, seconds, report)


def _slices(mapped: Mapped, reader: NativeReader, dtype: torch.dtype | None, bar: Any) -> Iterator[tuple]:
    """Megatron's names are ours: each slice goes over as it is."""
    for link in mapped.links:
        slice_ = reader.read(link.key, link.index)
        slice_ = slice_ if dtype is None else slice_.to(dtype)
        yield link.key, link.index, link.axes, slice_
        if link.key in LOCAL_NAMES:
            yield LOCAL_NAMES[link.key], link.index, link.axes, slice_
        bar.update(slice_.numel() * slice_.element_size())


def _compare(
    cfg: ConvertConfig, mapped: Mapped, theirs: MegatronSource, ours: Path, written: Path
) -> GateReport | None:
    """The gate between Megatron-Core's own model and ours."""

    def run(layers: list[int] | None, settings: GateSettings, scratch: Path) -> GateReport:
        folder = ours if layers is None else write_our_sample(mapped, ours, layers, scratch)

        def outputs(tokens: torch.Tensor) -> Any:
            return run_megatron(theirs.reader, theirs.fields, layers, tokens, settings.last)

        sides = Sides(outputs, lambda tokens: run_ours(folder, tokens, settings.last))
        return compare_sides(sides, mapped.model, folder, settings)

    return gate(cfg, mapped, run, written, Reach.of(mapped.model))
