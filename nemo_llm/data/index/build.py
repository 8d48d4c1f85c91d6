"""Text files to an indexed dataset: parallel, in flat memory, resumable after a kill, published atomically.

Workers tokenise shards; this process appends their tokens in the order of the plan to ``PREFIX.partial/data.bin`` and
notes in a journal how far it has come. After a kill at any moment, the next run cuts the file back to what the journal
says, checks its hash, and goes on. So the result does not depend on workers or interruptions, and the disk never holds
much more than the result: a shard's file goes as soon as it is appended.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_llm
from nemo_llm.corpus.documents import as_path, check_bad_share
from nemo_llm.corpus.shards import Shard, read_shard
from nemo_llm.data.index.format import token_dtype, write_index
from nemo_llm.data.index.plan import IndexPlan, IndexSettings, make_plan
from nemo_llm.data.index.worker import PoolJob, ShardReport, ShardTokeniser, run_in_worker, start_worker
from nemo_llm.errors import InputError
from nemo_llm.processes import worker_pool
from nemo_llm.storage.atomic_files import sync_stream, write_json
from nemo_llm.storage.build_cache import file_sha256
from nemo_llm.storage.unfinished_work import one_at_a_time, open_work
from nemo_llm.tokenizers.document_encoder import build_encoder
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer

_COPY_BYTES = 1 << 22
_SAMPLE_CHARACTERS = 50_000
_SAMPLE_FILES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexJob:
    """What to index, and how to go about it."""

    inputs: list[str]
    prefix: Path
    settings: IndexSettings
    cache: Path
    workers: int = 0
    max_bad_fraction: float = 0.01
    fast_path: bool = True
    overwrite: bool = False
    restart: bool = False


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """How far indexing has come."""

    shards_done: int
    shards: int
    report: ShardReport
    seconds: float


def build_index(job: IndexJob, on_progress: Callable[[IndexProgress], None] | None = None) -> dict[str, Any]:
    """Index, or go on with an interrupted run, and return the manifest (also written to ``PREFIX.manifest.json``).

    Raises InputError for inputs, settings and folders that do not serve, and NemoLlmError when a worker was killed; in
    both cases what was done stays and the same command goes on from there.
    """
    tokenizer = load_tokenizer(job.settings.tokenizer)
    plan = make_plan(job.inputs, job.settings, tokenizer.fingerprint)
    with one_at_a_time("output_prefix", job.prefix, job.workers):
        return _build(job, plan, tokenizer, on_progress)


def _build(
    job: IndexJob, plan: IndexPlan, tokenizer: Tokenizer, on_progress: Callable[[IndexProgress], None] | None
) -> dict[str, Any]:
    partial = Path(f"{job.prefix}.partial")
    identity = plan.identity()
    manifest = _published(job.prefix)
    if manifest is not None and manifest["identity"] == identity and not (partial / "publish.json").exists():
        return manifest
    if manifest is None and Path(f"{job.prefix}.idx").exists() and not partial.exists() and not job.overwrite:
        raise InputError(
            f"{job.prefix}.idx exists already; pass overwrite=true to replace it, or choose another prefix"
        )
    if manifest is not None and manifest["identity"] != identity and not job.overwrite:
        raise InputError(
            f"{job.prefix} was made from other inputs or settings; pass overwrite=true to replace it, or choose "
            "another prefix"
        )
    open_work(partial, identity, job.restart)
    if not (partial / "publish.json").exists():
        began = time.monotonic()
        journal = _Journal(partial)
        work = [
            (plan.inputs.shards[number], partial / f"shard-{number:08d}")
            for number in range(journal.committed, len(plan.inputs.shards))
        ]
        way, reports = _encoded(job, plan, tokenizer, work)
        with contextlib.closing(reports):  # whatever happens, the workers end here
            for report in reports:
                journal.commit(report)
                if on_progress is not None:
                    seconds = time.monotonic() - began
                    on_progress(IndexProgress(journal.committed, len(plan.inputs.shards), journal.report, seconds))
        found = journal.report
        check_bad_share(found.bad, found.documents, job.max_bad_fraction, found.bad_examples[:3])
        _write_manifest(partial, plan, tokenizer, journal, way)
    return _publish(job.prefix, partial)


def _encoded(
    job: IndexJob, plan: IndexPlan, tokenizer: Tokenizer, work: list[tuple[Shard, Path]]
) -> tuple[str, Generator[ShardReport, None, None]]:
    """Return how the text is encoded, and the reports of the shards in order, each when its files are there.

    The fast path is compared on text of these files first, while the workers start.
    """
    encoder = build_encoder(tokenizer, job.cache, fast=job.fast_path)
    if not work:
        return encoder.way, (ShardReport() for _ in ())
    pool_job = PoolJob(job.settings, job.cache, encoder.fast)
    pool = _start_pool(job, len(work), pool_job)
    difference = encoder.check(_samples(plan)) if encoder.fast else ""
    if difference:
        if pool is not None:
            pool.shutdown(wait=True)
        pool_job = dataclasses.replace(pool_job, fast=False)
        pool = _start_pool(job, len(work), pool_job)
        encoder = build_encoder(tokenizer, job.cache, fast=False)
    way = f"ordinary: {difference}" if difference else encoder.way
    if pool is None:
        tokeniser = ShardTokeniser(job.settings, encoder)
        return way, (tokeniser.run(shard, stem) for shard, stem in work)
    return way, _in_order(pool, functools.partial(run_in_worker, pool_job), work, ahead=job.workers + 2)


def _start_pool(job: IndexJob, tasks: int, pool_job: PoolJob) -> ProcessPoolExecutor | None:
    """Start the worker processes; None when this process is to do the work itself."""
    if job.workers == 0:
        return None
    pool = worker_pool(min(job.workers, tasks), start_worker, pool_job)
    pool.submit(os.getpid)  # the processes start with the first task
    return pool


def _in_order(
    pool: ProcessPoolExecutor,
    run: Callable[[Shard, Path], ShardReport],
    work: list[tuple[Shard, Path]],
    ahead: int,
) -> Generator[ShardReport, None, None]:
    """Keep ``ahead`` shards in work: enough to be busy, few enough that finished ones do not fill the disk."""
    running: deque[Future[ShardReport]] = deque()
    waiting = iter(work)
    try:
        while True:
            while len(running) < ahead and (task := next(waiting, None)) is not None:
                running.append(pool.submit(run, *task))
            if not running:
                return
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Journal:
    """The growing dataset and the note of how far it is whole."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self._path = partial / "journal.json"
        self.committed = 0
        self.report = ShardReport()
        self._hash = hashlib.sha256()
        self._streams = [(partial / f"data.{kind}").open("ab") for kind in ("bin", "lengths")]
        if self._path.exists():
            self._restore(json.loads(self._path.read_text(encoding="utf-8")))
        else:
            for stream in self._streams:
                stream.truncate(0)

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokens so far."""
        return self._hash.hexdigest()

    def commit(self, report: ShardReport) -> None:
        """Append the next shard's files, make them last, note it, and remove them."""
        stem = f"shard-{self.committed:08d}"
        for stream, kind in zip(self._streams, ("bin", "lengths"), strict=True):
            with (self._partial / f"{stem}.{kind}").open("rb") as source:
                while block := source.read(_COPY_BYTES):
                    stream.write(block)
                    if kind == "bin":
                        self._hash.update(block)
            sync_stream(stream)
        self.report.add(report)
        self.committed += 1
        write_json(
            self._path,
            {
                "committed": self.committed,
                "sizes": [stream.tell() for stream in self._streams],
                "sha256": self.sha256,
                "report": dataclasses.asdict(self.report),
            },
        )
        for kind in ("bin", "lengths"):
            (self._partial / f"{stem}.{kind}").unlink()

    def _restore(self, note: dict[str, Any]) -> None:
        for stream, size in zip(self._streams, note["sizes"], strict=True):
            stream.truncate(size)
            stream.seek(size)
        with (self._partial / "data.bin").open("rb") as tokens:
            while block := tokens.read(_COPY_BYTES):
                self._hash.update(block)
        if self.sha256 != note["sha256"]:
            raise InputError(
                f"{self._partial}: the tokens of the interrupted run do not match its journal; pass restart=true to "
                "start anew"
            )
        self.committed = note["committed"]
        self.report = ShardReport(**note["report"])


def _samples(plan: IndexPlan) -> list[str]:
    """Return some text from the beginning of several input files, to compare ids on."""
    texts: list[str] = []
    step = max(1, len(plan.inputs.shards) // _SAMPLE_FILES)
    for shard in plan.inputs.shards[::step][:_SAMPLE_FILES]:
        wanted = _SAMPLE_CHARACTERS
        if shard.stop is None:
            continue  # a whole file, perhaps one document of a gigabyte
        for item in read_shard(shard, plan.settings.text_format):
            text = getattr(item, "text", "")[:wanted]
            texts.append(text)
            wanted -= len(text)
            if wanted <= 0:
                break
    return texts


def _write_manifest(partial: Path, plan: IndexPlan, tokenizer: Tokenizer, journal: _Journal, way: str) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    plan.inputs.check_unchanged("indexed")
    write_index(partial / "data.idx", dtype, partial / "data.lengths", None)
    (partial / "data.lengths").unlink()
    manifest = {
        "format": 1,
        "made_by": f"nemo_llm {nemo_llm.__version__}",
        "dtype": dtype.name,
        "documents": journal.report.documents,
        "tokens": journal.report.tokens,
        "characters": journal.report.characters,
        "max_token_id": journal.report.max_token_id,
        "files": {
            ".bin": {"bytes": (partial / "data.bin").stat().st_size, "sha256": journal.sha256},
            ".idx": {"bytes": (partial / "data.idx").stat().st_size, "sha256": file_sha256(partial / "data.idx")},
        },
        "tokenizer": {
            "name": plan.settings.tokenizer.name,
            "type": plan.settings.tokenizer.type,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "config": dataclasses.asdict(plan.settings.tokenizer),
        },
        "encoded_by": way,
        "bad_records": journal.report.bad,
        "bad_examples": journal.report.bad_examples,
        "sources": [
            {"path": file, "bytes": size, "sha256": file_sha256(as_path(file))} for file, size, _ in plan.inputs.files
        ],
        "identity": plan.identity(),
    }
    write_json(partial / "publish.json", manifest)


def _publish(prefix: Path, partial: Path) -> dict[str, Any]:
    """Move the finished files to their places; a rerun after a kill in between moves the rest.

    The old index goes first and the new one comes after the tokens, so that no reader sees one with the other's tokens.
    """
    manifest: dict[str, Any] = json.loads((partial / "publish.json").read_text(encoding="utf-8"))
    if (partial / "data.bin").exists():
        Path(f"{prefix}.manifest.json").unlink(missing_ok=True)
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    for suffix in (".bin", ".idx"):
        if (partial / f"data{suffix}").exists():
            (partial / f"data{suffix}").replace(f"{prefix}{suffix}")
    write_json(Path(f"{prefix}.manifest.json"), manifest)
    shutil.rmtree(partial)
    return manifest


def _published(prefix: Path) -> dict[str, Any] | None:
    """Return the manifest of a whole dataset that this module made, else None."""
    try:
        manifest: dict[str, Any] = json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))
        whole = all(Path(f"{prefix}{s}").stat().st_size == facts["bytes"] for s, facts in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole and "identity" in manifest else None
