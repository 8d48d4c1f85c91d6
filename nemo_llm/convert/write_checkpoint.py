"""What every way of conversion shares: writing a checkpoint of ours, the gate, the report beside the weights."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch
from tqdm import tqdm

from nemo_llm.checkpoint.folder import TOKENIZER_FOLDER_NAME, begin, commit, require_weights, temporary_of
from nemo_llm.checkpoint.saved_run import write_config
from nemo_llm.checkpoint.state_files import NativeReader, NativeWriter, TensorInfo
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.convert.logit_check import GateReport, GateSettings
from nemo_llm.convert.mapping import Mapped
from nemo_llm.convert.reach import Reach
from nemo_llm.errors import InputError
from nemo_llm.families.spec import Link
from nemo_llm.log import get_logger
from nemo_llm.tokenizers.tokenizer import load_tokenizer

_log = get_logger(__name__)

T = TypeVar("T")

REPORT_NAME = "conversion.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPARE_BYTES = 64 << 20
_MEMORY_SHARE = 0.6  # the rest is for activations, logits and others on the machine
_SAMPLED_LAYERS = 6
_LAST_TOKENS = 32


class Reader(Protocol):
    """Tensors of another program by their names."""

    infos: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        ...


@dataclass(frozen=True, slots=True)
class ConversionOutcome:
    """What a conversion did."""

    output: Path
    num_bytes: int
    seconds: float
    gate: GateReport | None


@dataclass(frozen=True, slots=True)
class Written:
    """The weights of a checkpoint of ours that is not committed yet."""

    temporary: Path
    num_bytes: int
    seconds: float
    entries: Mapping[str, dict[str, Any]]

    def commit(self, cfg: ConvertConfig, mapped: Mapped, report: GateReport | None, output: Path) -> ConversionOutcome:
        """Let the checkpoint appear."""
        write_report(self.temporary, cfg, mapped, report)
        commit(self.temporary, output, dict(self.entries))
        return ConversionOutcome(output, self.num_bytes, self.seconds, report)


def paths_of(cfg: ConvertConfig) -> tuple[Path, Path]:
    """Input and output.

    Raises:
        InputError: an output that must not be replaced.
    """
    source, output = Path(cfg.input).expanduser(), Path(cfg.output).expanduser()
    if output.exists() and not cfg.overwrite:
        raise InputError(f"output={output}: exists already; name another folder, or give overwrite=true")
    if output.exists() and output.resolve() == source.resolve():
        raise InputError(f"output={output}: is the input as well")
    return source, output


def begin_or_continue(cfg: ConvertConfig, source: Path, output: Path) -> Path:
    """The hidden folder to write in: that of the same conversion which was killed, or a new one.

    What it was begun from is noted beside it (`forget_beginning`): files of another size or time begin anew.
    """
    temporary, note = temporary_of(output), _note_of(output)
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps({"conversion": asdict(cfg), "files": states})
    if note.is_file() and temporary.is_dir() and note.read_text(encoding="utf-8") == content:
        _log.info("%s: continues where an earlier conversion was stopped", temporary)
        return temporary
    begin(output)
    note.write_text(content, encoding="utf-8")
    return temporary


def forget_beginning(output: Path) -> None:
    """Remove what `begin_or_continue` made, where it is still there: not after a kill, but after anything else."""
    shutil.rmtree(temporary_of(output), ignore_errors=True)
    _note_of(output).unlink(missing_ok=True)


def _note_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.begun.json")


def write_ours(cfg: ConvertConfig, mapped: Mapped, reader: Reader, temporary: Path) -> Written:
    """Write the weights, one slice at a time."""
    began = time.monotonic()
    wanted = wanted_dtype(cfg)
    total = sum(_size(reader.infos[name], wanted) for link in mapped.links for name in link.names)
    check_room(temporary, total)
    with NativeWriter(temporary / "state") as writer, progress(total) as bar:
        for link, slice_ in ahead(_slices(mapped, reader, writer.num_done, wanted)):
            writer.write(link.key, link.index, link.axes, slice_)
            bar.update(slice_.numel() * slice_.element_size())
    return Written(temporary, total, time.monotonic() - began, writer.entries)


def _slices(
    mapped: Mapped, reader: Reader, num_done: int, dtype: torch.dtype | None
) -> Iterator[tuple[Link, torch.Tensor]]:
    """Our slices in the order of the table; of the first ``num_done`` shape and type alone."""
    for number, link in enumerate(mapped.links):
        read = reader.read if number >= num_done else lambda name: reader.infos[name].meta()
        slice_ = mapped.to_ours(link, [read(name) for name in link.names])
        yield link, slice_ if dtype is None else slice_.to(dtype)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next is made by another thread while one is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Any] = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def finish_ours(config: Mapping[str, Any], tokenizer: TokenizerConfig | None, temporary: Path, source: Path) -> None:
    """Configuration, and tokenizer where there is one, beside the weights."""
    write_config(temporary, config)
    if tokenizer is not None:
        load_tokenizer(tokenizer).save(temporary / TOKENIZER_FOLDER_NAME)
    else:
        _log.warning("%s has no tokenizer.json: the checkpoint gets no tokenizer", source)


def gate(
    cfg: ConvertConfig,
    mapped: Mapped,
    run: Callable[[list[int] | None, GateSettings, Path], GateReport],
    written: Path,
    reach: Reach,
) -> GateReport | None:
    """Compare both models, whole or a sample of their layers; None where that was not asked for.

    Args:
        run: compares these layers (all: None); the folder is for what it needs on the way.
        written: what appears if they agree.
        reach: lengths that short texts do not show: one long text goes through the first layers.

    Raises:
        CheckpointError: they differ.
    """
    if not cfg.verify:
        return None
    settings = GateSettings(cfg.verify_tokens, cfg.tolerance, cfg.layer_by_layer)
    count = cfg.verify_layers or _layers_that_fit(mapped)
    with tempfile.TemporaryDirectory(dir=written.parent, prefix=f"{written.name}.gate.") as scratch:
        if count >= mapped.model["num_layers"]:
            report = run(None, settings, Path(scratch))
        else:
            layers = choose_layers(mapped.model, count)
            report = replace(run(layers, settings, Path(scratch)), sampled_layers=layers)
        report.raise_if_different(f"{written.name}: removed")
        length, read, left = reach.plan(report.length)
        if length is not None:
            count = reach.layers
            first = None if count == mapped.model["num_layers"] else list(range(count))
            long = run(first, replace(settings, tokens=length, last=_LAST_TOKENS), Path(scratch) / "long")
            what = f"a text of {length:,} tokens, longer than {', '.join(map(str, read))}"
            long.raise_if_different(f"this was {what}.\n{written.name}: removed")
            beyond = f"{what}, through the first layers ({count}): logits differ by at most {long.max_difference:.2e}"
            report = replace(report, beyond=beyond)
    return replace(report, not_seen=[str(threshold) for threshold in left])


def choose_layers(model: Mapping[str, Any], count: int) -> list[int]:
    """About ``count`` layers, spread over the model; whole periods where windows alternate from layer to layer."""
    layers, period = model["num_layers"], model["window_attn_skip_freq"] or 1
    periods = layers // period
    wanted = max(1, min(count // period, periods))
    starts = sorted({round(n * (periods - 1) / max(wanted - 1, 1)) for n in range(wanted)})
    return [start * period + place for start in starts for place in range(period)]


def _layers_that_fit(mapped: Mapped) -> int:
    """All layers, or a sample where the model in float32 would take most of the free memory."""
    elements = sum(math.prod(shape) for shape in mapped.our_shapes().values())
    fits = 4 * elements < _MEMORY_SHARE * psutil.virtual_memory().available
    return mapped.model["num_layers"] if fits else _SAMPLED_LAYERS


def write_report(folder: Path, cfg: ConvertConfig, mapped: Mapped | None, report: GateReport | None) -> None:
    """What was converted (None: an adapter) and how it compared, beside the weights."""
    content = {
        "source_format": cfg.source_format,
        "target_format": cfg.target_format,
        **({} if mapped is None else {"family": mapped.family.model_type, "tensors": len(mapped.links)}),
        "gate": None if report is None else asdict(report),
    }
    (folder / REPORT_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def appear(temporary: Path, output: Path) -> None:
    """Let a folder of another program's kind appear; a checkpoint of ours is committed instead."""
    if output.exists():
        shutil.rmtree(output)
    temporary.rename(output)


def open_ours(cfg: ConvertConfig, mapped: Mapped, folder: Path) -> tuple[NativeReader, dict[str, TensorInfo]]:
    """A checkpoint of ours, checked against the table, and the tensors that will be made of it."""
    require_weights(folder)
    reader = NativeReader(folder / "state")
    mapped.check_ours(reader.infos, str(folder))
    wanted = wanted_dtype(cfg)
    return reader, mapped.their_infos({key: wanted or info.dtype for key, info in reader.infos.items()})


def wanted_dtype(cfg: ConvertConfig) -> torch.dtype | None:
    """The format that was asked for; None keeps each tensor's own."""
    return None if cfg.dtype is None else _DTYPES[cfg.dtype]


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        InputError: says how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise InputError(
            f"{folder.parent}: the result takes {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB free"
        )


def _size(info: TensorInfo, dtype: torch.dtype | None) -> int:
    return info.num_bytes if dtype is None else TensorInfo(info.shape, dtype).num_bytes


def progress(total: int) -> Any:
    """A bar on terminals."""
    return tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None, leave=False)
