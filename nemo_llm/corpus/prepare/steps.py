"""Steps of ours for datatrove's pipelines: reading our shards, files between stages, lengths, languages, masks.

datatrove 0.10.1's own reader leaves out malformed lines in silence and stops at a wrong byte, and its writer makes no
file for a task without documents, so that later stages take one task's file for another's. Ours count every record and
name every file by its task.
"""

import contextlib
import gzip
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.language_filter import LanguageFilter
from datatrove.utils.lid import FT176LID
from numpy.typing import NDArray

from nemo_llm.config.commands.prepare import LanguageRule, LengthRule, MaskRule
from nemo_llm.corpus.documents import BadRecord, BadRecordError, open_stream
from nemo_llm.corpus.prepare.personal_data import Masker
from nemo_llm.corpus.shards import Shard, TextFormat, read_shard
from nemo_llm.storage.atomic_files import replacing

EXAMPLES = 3
_EXAMPLE_CHARACTERS = 400
_BLOCK_OF_RUNS = 1 << 12


def task_file(folder: Path, rank: int, compression: str = "") -> Path:
    """Path of a task's documents."""
    return folder / f"{rank:05d}.jsonl{compression}"


class Dropped:
    """Keeps dropped documents with the reason: all, or the beginnings of a few of each reason.

    It stands where datatrove expects a writer, of which it uses no more than this.
    """

    def __init__(self, folder: Path, reason: str, everything: bool) -> None:
        self._folder, self._reason, self._everything = folder, reason, everything
        self._seen: dict[str, int] = {}
        self._stream: IO[str] | None = None

    def __enter__(self) -> "Dropped":
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def write(self, document: Document, rank: int = 0) -> None:
        """Note a document that a filter drops."""
        reason = document.metadata.pop("filter_reason", self._reason)
        text: Any = document.text if self._everything else document.text[:_EXAMPLE_CHARACTERS]
        self.note(reason, document.id, text, rank)

    def note(self, reason: str, source: str, text: str, rank: int) -> None:
        """Note anything that is left out."""
        self._seen[reason] = self._seen.get(reason, 0) + 1
        if not self._everything and self._seen[reason] > EXAMPLES:
            return
        if self._stream is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stream = task_file(self._folder, rank).open("w", encoding="utf-8")
        record = {"text": text, "reason": reason, "source": source}
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")


class ReadShards(PipelineStep):
    """Yields the documents of a task's shards; counts what cannot be read, with the first few examples."""

    type = "READ"
    name = "input files"

    def __init__(
        self, tasks: tuple[tuple[Shard, ...], ...], text_format: TextFormat, base: str, stop_at_bad: bool, bad: Dropped
    ) -> None:
        super().__init__()
        self._tasks, self._text_format, self._base = tasks, text_format, base
        self._stop_at_bad, self._bad = stop_at_bad, bad

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002 - datatrove's
        """Yield documents; raises BadRecordError at the first bad record where none is tolerated."""
        with self._bad:
            for shard in self._tasks[rank]:
                name = os.path.relpath(shard.file, self._base) + (f"@{shard.start}" if shard.start else "")
                for item in read_shard(shard, self._text_format):
                    self.stat_update("total")
                    if isinstance(item, BadRecord):
                        if self._stop_at_bad:
                            raise BadRecordError(item)
                        self.stat_update("dropped", f"dropped_{item.reason}")
                        self._bad.note(item.reason, f"{item.file}:{item.line}", item.detail, rank)
                        continue
                    self.stat_update("forwarded", f"length_{len(item.text).bit_length()}")
                    self.stat_update("characters", value=len(item.text))
                    yield Document(text=item.text, id=f"{name}:{item.line}", metadata=dict(item.fields))


class ReadStage(PipelineStep):
    """Yields the documents that the same task of an earlier stage wrote."""

    type = "READ"
    name = "earlier stage"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002 - datatrove's
        """Yield documents in the order they were written in."""
        with open_stream(task_file(self._folder, rank)) as stream:
            for line in stream:
                record = json.loads(line)
                self.stat_update("total", "forwarded")
                yield Document(text=record.pop("text"), id=record.pop("source"), metadata=record)


class WriteStage(PipelineStep):
    """Writes the documents of a task to a file that appears complete, or not at all; also when there are none."""

    type = "WRITE"
    name = "documents"

    def __init__(self, folder: Path, compression: str = "") -> None:
        super().__init__()
        self._folder, self._compression = folder, compression

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002 - datatrove's
        """Write all documents."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = task_file(self._folder, rank, self._compression)
        with replacing(path) as file, self._compressed(file) as stream:
            for document in data:
                self.stat_update("total", f"length_{len(document.text).bit_length()}")
                self.stat_update("characters", value=len(document.text))
                stream.write(self._line(document))

    @staticmethod
    def _line(document: Document) -> bytes:
        record = {**document.metadata, "text": document.text, "source": document.id}
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()

    def _compressed(self, file: IO[bytes]) -> Any:
        if self._compression == ".gz":
            return gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0)
        if self._compression == ".zst":
            import zstandard

            return zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False)
        return contextlib.nullcontext(file)


class LengthFilter(BaseFilter):
    """Drops documents outside a range of lengths."""

    name = "length"

    def __init__(self, rule: LengthRule, dropped: Dropped) -> None:
        super().__init__(dropped)
        self._rule = rule

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Return whether it stays, or why not."""
        if len(document.text) < self._rule.min_characters:
            return False, "too short"
        return (False, "too long") if len(document.text) > self._rule.max_characters else True


class _ModelAtHand(FT176LID):
    """datatrove's language model from a file, instead of one that it downloads."""

    def __init__(self, path: str, languages: list[str]) -> None:
        super().__init__(languages)
        self._path = path

    @cached_property
    def model(self) -> Any:
        from fasttext.FastText import _FastText  # as datatrove does: the public loader prints a warning

        return _FastText(self._path)


class LocalLanguageFilter(LanguageFilter):
    """datatrove's language filter on a model that is at hand, with the language found as the reason for a drop."""

    name = "language"

    def __init__(self, rule: LanguageRule, model: str, dropped: Dropped) -> None:
        super().__init__(list(rule.keep), rule.min_score, dropped)
        self.model = _ModelAtHand(model, list(rule.keep))

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Return whether it stays, or which language it seems to be in."""
        stays = super().filter(document)
        found = document.metadata["language"]
        if stays:
            return True
        return False, f"unsure {found}" if found in (self.languages or []) else f"language {found}"


class BoundedSignature(MinhashDedupSignature):
    """datatrove's signatures, in memory that does not grow with 112 hashes for each word of the longest document."""

    def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
        """Return the least hashes of all runs of words: the least of those of each block."""
        blocks = [
            np.array(super(BoundedSignature, self).get_signature(shingles[start : start + _BLOCK_OF_RUNS]))
            for start in range(0, len(shingles), _BLOCK_OF_RUNS)
        ]
        return np.minimum.reduce(blocks).tolist()


class MaskPersonalData(PipelineStep):
    """Replaces personal data and counts the masks."""

    type = "FORMAT"
    name = "masks"

    def __init__(self, rule: MaskRule) -> None:
        super().__init__()
        self._masker = Masker(rule)

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        """Yield every document, with its masks."""
        for document in data:
            document.text, counts = self._masker.mask(document.text)
            self.stat_update("total", "forwarded")
            if counts:
                self.stat_update("documents with masks")
            for mask, count in counts.items():
                self.stat_update(f"mask_{mask}", value=count)
            yield document
