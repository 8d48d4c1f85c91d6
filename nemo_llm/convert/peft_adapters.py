"""Adapters to and from folders of Hugging Face's peft, compared with peft first; adapters merged into weights."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.fingerprint import weights_fingerprint
from nemo_llm.checkpoint.folder import (
    TOKENIZER_FOLDER_NAME,
    begin,
    commit,
    copy_tokenizer,
    resolve_checkpoint,
    writing,
)
from nemo_llm.checkpoint.manifest import verify
from nemo_llm.checkpoint.saved_run import TEMPLATE_FILE_NAME, SavedRun, write_config
from nemo_llm.checkpoint.weights import load_weights, save_weights
from nemo_llm.checkpoint.writer import StateWriter
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.compose.decode import decode, to_dict
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.shipped import one_cpu, read_shipped, reference_fp32
from nemo_llm.conversation.template import save_template
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
from nemo_llm.convert.write_checkpoint import ConversionOutcome, appear, paths_of, write_report
from nemo_llm.errors import InputError
from nemo_llm.models.build import build_model_chunks
from nemo_llm.parallel.runtime import own_runtime
from nemo_llm.peft.adapter import adapter_state, merge_adapters
from nemo_llm.peft.attach import attach_peft
from nemo_llm.peft.hf_format import export_adapter, load_hf_adapter, section_of_folder
from nemo_llm.peft.state import load_adapter, write_description


def convert_adapter(cfg: ConvertConfig) -> ConversionOutcome:
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


def _to_peft(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> ConversionOutcome:
    saved = SavedRun.open(source)
    folder, run = saved.folder, saved.sections
    if run.peft is None:
        raise InputError(f"{folder} was made by a run without peft; its weights are converted with target_format=hf")
    named = cfg.base or run.checkpoint.init_from
    if named is None:
        raise InputError("base: needed; the run of this adapter started from no checkpoint, and none is named")
    base, setting = resolve_checkpoint(Path(named).expanduser()), reference_fp32(saved_model(saved), run.peft)
    began = time.monotonic()
    shutil.rmtree(temporary / "state")
    export_adapter(folder, temporary, named)
    seconds = time.monotonic() - began
    report = None
    if cfg.verify:
        with _adapted(setting, base) as (chunk, fingerprint):
            load_adapter([chunk], folder, fingerprint)
            report = _compare(cfg, setting, chunk, (base, temporary))
    num_bytes = sum(path.stat().st_size for path in temporary.iterdir())
    write_report(temporary, cfg, None, report)
    appear(temporary, output)
    return ConversionOutcome(output, num_bytes, seconds, report)


def _to_ours(cfg: ConvertConfig, source: Path, temporary: Path, output: Path) -> ConversionOutcome:
    if cfg.base is None:
        raise InputError("base: needed; name the checkpoint of ours that the adapter stands on")
    saved = SavedRun.open(Path(cfg.base).expanduser())
    base, peft = saved.folder, section_of_folder(source)
    run = decode({**saved.mapping, "peft": {**read_shipped(f"peft/{peft['kind']}"), **peft}})
    run = replace(run, checkpoint=replace(run.checkpoint, init_from=str(base.resolve())), model=saved_model(saved))
    assert run.peft is not None
    setting = reference_fp32(run.model, run.peft)
    with _adapted(setting, base) as (chunk, fingerprint):
        load_hf_adapter([chunk], source, run.peft)
        began = time.monotonic()
        plan = StateWriter(None, threads=2).begin({"adapter": adapter_state([chunk])}, temporary / "state", copy=False)
        plan.write()
        plan.collect()
        seconds = time.monotonic() - began
        report = _compare(cfg, setting, chunk, (base, source)) if cfg.verify else None
    write_description(temporary, run.peft, fingerprint)
    write_config(temporary, to_dict(run))
    template = source / TEMPLATE_FILE_NAME
    if copy_tokenizer(base, temporary) and template.is_file():
        save_template(template.read_text(encoding="utf-8"), temporary / TOKENIZER_FOLDER_NAME)
    write_report(temporary, cfg, None, report)
    num_bytes = sum(path.stat().st_size for path in (temporary / "state").iterdir())
    commit(temporary, output)
    return ConversionOutcome(output, num_bytes, seconds, report)


def merge_checkpoint(checkpoint: Path, output: Path) -> Path:
    """Write ``output``, a checkpoint of weights alone that does what base and adapter do together.

    Runs on one process, in fp32 whatever the run trained in; the sum is rounded once, when it is loaded in 16 bits.

    Raises:
        CheckpointError: no adapter there, or other base weights than it was trained on.
        InputError: an adapter that is no change of weights; an output that exists.
    """
    if output.exists():
        raise InputError(f"{output}: exists already; name another folder")
    saved = SavedRun.open(checkpoint)
    folder, cfg = saved.folder, saved.sections
    if cfg.peft is None:
        raise InputError(f"{folder} was made by a run without peft: there is nothing to merge")
    base = None if cfg.checkpoint.init_from is None else resolve_checkpoint(Path(cfg.checkpoint.init_from))
    if base is not None:
        verify(base, cfg.checkpoint.verify, (0, 1))
    setting = replace(reference_fp32(saved_model(saved), cfg.peft), seed=cfg.trainer.seed)
    with _adapted(setting, base, new_head=True) as (chunk, fingerprint):
        load_adapter([chunk], folder, fingerprint)
        merge_adapters([chunk])
        plain = replace(cfg, peft=None, checkpoint=replace(cfg.checkpoint, init_from=None))
        with writing(output) as temporary:
            save_weights([chunk], temporary)
            write_config(temporary, to_dict(plain))
            shutil.copytree(folder / TOKENIZER_FOLDER_NAME, temporary / TOKENIZER_FOLDER_NAME)
    return output


@contextmanager
def _adapted(setting: ModelSetting, base: Path | None, new_head: bool = False) -> Iterator[tuple[torch.nn.Module, str]]:
    """The base model with fresh adapters on the CPU of this process alone, and the fingerprint of its weights.

    Args:
        setting: with adapters.
        base: checkpoint of the weights; None: those that the setting's seed draws.
        new_head: as in `load_weights`.
    """
    with own_runtime(one_cpu()) as runtime:
        chunks = build_model_chunks(setting, runtime, setting.model.vocab_size or 0)
        if base is not None:
            load_weights(chunks, base, new_head)
        fingerprint = weights_fingerprint(chunks, runtime.device)
        attach_peft(setting, chunks, runtime)
        yield chunks[0].eval(), fingerprint


def _compare(cfg: ConvertConfig, setting: ModelSetting, chunk: Any, folders: tuple[Path, Path]) -> GateReport:
    """The gate: peft on transformers' form of the base, beside our model with the adapter.

    Args:
        folders: the base, a checkpoint of ours, and the adapter as a folder of peft.
    """
    base, adapter = folders
    assert setting.peft is not None
    virtual = setting.peft.virtual_tokens

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
    report = compare_sides(Sides(theirs, ours), asdict(setting.model), base, settings)
    report.raise_if_different(f"{cfg.output}: not written")
    return report


def _last(outputs: Outputs, tokens: torch.Tensor, virtual: int) -> Outputs:
    """Without what virtual tokens in front brought forth."""
    length = tokens.shape[1]
    return Outputs(
        outputs.logits[:, -length:], [hidden[:, -length:] for hidden in outputs.hidden] if virtual == 0 else []
    )
