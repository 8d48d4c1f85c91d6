"""Adapters to and from folders of Hugging Face's peft, as conversions: compared with peft before they appear."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_llm.checkpoint.fingerprint import weights_fingerprint
from nemo_llm.checkpoint.folder import begin, commit, read_config, resolve_checkpoint
from nemo_llm.checkpoint.weights import load_weights
from nemo_llm.checkpoint.writer import StateWriter
from nemo_llm.config import RunConfig
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.compose.load import compose, decode, decode_saved, to_dict, with_younger_keys
from nemo_llm.convert.convert import convert
from nemo_llm.convert.logit_check import (
    GateReport,
    GateSettings,
    Outputs,
    Sides,
    compare_sides,
    forward_ours,
    forward_theirs,
    load_theirs,
    saved_model,
)
from nemo_llm.convert.write_checkpoint import Outcome, appear, paths_of, write_report
from nemo_llm.data.chat_template import TEMPLATE_FILE_NAME, save_template
from nemo_llm.errors import InputError
from nemo_llm.models.build import build_model_chunks
from nemo_llm.parallel.runtime import own_runtime
from nemo_llm.peft.adapter import adapter_state
from nemo_llm.peft.attach import attach_peft
from nemo_llm.peft.hf_format import export_adapter, load_hf_adapter, section_of_folder
from nemo_llm.peft.state import load_adapter, write_description


def convert_adapter(cfg: ConvertConfig) -> Outcome:
    """Convert between a checkpoint of a run with ``peft`` and a folder of Hugging Face's peft.

    Raises:
        InputError: an input that cannot be converted, a base that is not known, an output that exists.
        CheckpointError: a damaged checkpoint, or models whose logits differ.
    """
    source, output = paths_of(cfg)
    if {cfg.source_format, cfg.target_format} != {"peft", "nemo_llm"}:
        raise InputError(f"{cfg.source_format} to {cfg.target_format}: peft is converted from and to nemo_llm alone")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = begin(output)
    try:
        return (_to_peft if cfg.target_format == "peft" else _to_ours)(cfg, source, temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_peft(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> Outcome:
    folder = resolve_checkpoint(source)
    run = decode_saved({**read_config(folder), "model": saved_model(folder)})
    if run.peft is None:
        raise InputError(f"{folder} was made by a run without peft; its weights are converted with target_format=hf")
    base = _base(cfg, run)
    began = time.monotonic()
    shutil.rmtree(temporary / "state")
    export_adapter(folder, temporary, cfg.base or run.checkpoint.init_from)
    seconds = time.monotonic() - began
    report = None
    if cfg.verify:
        with _adapted(run, base) as (chunk, fingerprint):
            load_adapter([chunk], folder, fingerprint)
            report = _compare(cfg, run, chunk, (base, temporary))
    num_bytes = sum(path.stat().st_size for path in temporary.iterdir())
    write_report(temporary, cfg, None, report)
    appear(temporary, output)
    return Outcome(output, num_bytes, seconds, report)


def _to_ours(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> Outcome:
    if cfg.base is None:
        raise InputError("base: needed; name the checkpoint of ours that the adapter stands on")
    base = resolve_checkpoint(Path(cfg.base).expanduser())
    section = section_of_folder(source)
    peft = {**to_dict(compose(["+model=gpt_tiny", f"peft={section['kind']}"]))["peft"], **section}
    content = {**with_younger_keys(read_config(base)), "model": saved_model(base), "peft": peft}
    content["checkpoint"] = {**content["checkpoint"], "init_from": str(base.resolve())}
    run = decode(content)
    assert run.peft is not None
    with _adapted(run, base) as (chunk, fingerprint):
        load_hf_adapter([chunk], source, run.peft)
        began = time.monotonic()
        plan = StateWriter(None, threads=2).begin({"adapter": adapter_state([chunk])}, temporary / "state", copy=False)
        plan.write()
        plan.collect()
        seconds = time.monotonic() - began
        report = _compare(cfg, run, chunk, (base, source)) if cfg.verify else None
    write_description(temporary, run.peft, fingerprint)
    (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(run), sort_keys=False), encoding="utf-8")
    if (base / "tokenizer").is_dir():
        shutil.copytree(base / "tokenizer", temporary / "tokenizer")
        if (source / TEMPLATE_FILE_NAME).is_file():
            save_template((source / TEMPLATE_FILE_NAME).read_text(encoding="utf-8"), temporary / "tokenizer")
    write_report(temporary, cfg, None, report)
    num_bytes = sum(path.stat().st_size for path in (temporary / "state").iterdir())
    commit(temporary, output)
    return Outcome(output, num_bytes, seconds, report)


def _base(cfg: ConvertConfig, run: RunConfig) -> Path:
    named = cfg.base or run.checkpoint.init_from
    if named is None:
        raise InputError("base: needed; the run of this adapter started from no checkpoint, and none is named")
    return resolve_checkpoint(Path(named).expanduser())


@contextmanager
def _adapted(run: RunConfig, base: Path) -> Iterator[tuple[torch.nn.Module, str]]:
    """The base model with fresh adapters, in float32 on this process alone, and the fingerprint of its weights."""
    single = compose(["+model=gpt_tiny", "parallelism=single", "precision=fp32", "trainer.accelerator=cpu"])
    trainer = replace(run.trainer, accelerator="cpu")
    run = replace(run, parallelism=single.parallelism, precision=single.precision, trainer=trainer)
    with own_runtime(run) as runtime:
        chunks = build_model_chunks(run, runtime, run.model.vocab_size or 0)
        load_weights(chunks, base)
        fingerprint = weights_fingerprint(chunks, runtime.device)
        attach_peft(run, chunks, runtime)
        yield chunks[0].eval(), fingerprint


def _compare(cfg: ConvertConfig, run: RunConfig, chunk: Any, folders: tuple[Path, Path]) -> GateReport:
    """The gate: peft on transformers' form of the base, beside our model with the adapter.

    Args:
        folders: the base, a checkpoint of ours, and the adapter as a folder of peft.
    """
    base, adapter = folders
    assert run.peft is not None
    virtual = run.peft.virtual_tokens

    def ours(tokens: torch.Tensor) -> Outputs:
        front = -1 - torch.arange(virtual).expand(tokens.shape[0], -1)
        return _last(forward_ours(chunk, torch.cat((front, tokens), 1)), tokens, virtual)

    def theirs(tokens: torch.Tensor) -> Outputs:
        import peft

        with tempfile.TemporaryDirectory(dir=adapter.parent, prefix=f".{adapter.name}.base.") as scratch:
            hf = Path(scratch) / "hf"
            convert(
                replace(
                    cfg, source_format="nemo_llm", target_format="hf", input=str(base), output=str(hf), verify=False
                )
            )
            model: Any = peft.PeftModel.from_pretrained(load_theirs(hf), str(adapter)).eval()
            return _last(forward_theirs(model, tokens), tokens, virtual)

    settings = GateSettings(cfg.verify_tokens, cfg.tolerance, cfg.layer_by_layer)
    limits = {"vocab_size": run.model.vocab_size, "max_position_embeddings": run.model.max_position_embeddings}
    report = compare_sides(Sides(theirs, ours), limits, base, settings)
    report.raise_if_different(f"{cfg.output}: not written")
    return report


def _last(outputs: Outputs, tokens: torch.Tensor, virtual: int) -> Outputs:
    """Without what virtual tokens in front brought forth."""
    length = tokens.shape[1]
    return Outputs(
        outputs.logits[:, -length:], [hidden[:, -length:] for hidden in outputs.hidden] if virtual == 0 else []
    )
