"""Raw text named in a blend: tokenised once into the cache and opened as an indexed dataset."""

import os
from pathlib import Path

from nemo_llm.config.sections.sources import TextSource
from nemo_llm.corpus.documents import expand_inputs
from nemo_llm.data.index.build import IndexJob, build_index
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.index.plan import IndexSettings
from nemo_llm.data.sources.indexed import checked
from nemo_llm.data.sources.kind import FileKind, OpenContext
from nemo_llm.storage.build_cache import build_once, content_key, file_sha256

_MANY_BYTES = 1 << 26  # from here on, worker processes and the proof of the fast path are worth their seconds
_MAX_WORKERS = 16


class TextKind(FileKind[TextSource]):
    """Raw text, as the indexed dataset of it in the cache."""

    def open(self, context: OpenContext) -> IndexedDataset:
        """Open the dataset, built the first time.

        Raises:
            InputError: missing files; the first record that cannot be read, with file and line.
        """
        files, config = expand_inputs(self.entry.path), context.config
        key = content_key(
            kind="text",
            files=[file_sha256(file) for file in files],
            text_key=config.text_key,
            tokenizer=context.tokenizer.fingerprint,
        )
        settings = IndexSettings(
            tokenizer=config.tokenizer,
            text_key=config.text_key,
            plain_text="file",
            encoding="utf-8",
            append_eod=True,
            on_bad_record="error",
        )
        many = sum(file.stat().st_size for file in files) > _MANY_BYTES

        def build(folder: Path) -> dict:
            job = IndexJob(
                inputs=[str(file) for file in files],
                prefix=folder / "data",
                settings=settings,
                cache=context.cache,
                workers=min(_MAX_WORKERS, os.cpu_count() or 1) if many else 0,
                fast_path=many,
            )
            return {"dataset": build_index(job)}

        folder = context.cache / f"text-{key}"
        build_once(folder, build)
        return checked(IndexedDataset(folder / "data"), self.entry.name, context)
