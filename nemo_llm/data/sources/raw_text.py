"""Raw text named in a blend: tokenised once into the cache and opened as an indexed dataset."""

import os
from pathlib import Path

from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.corpus.documents import expand_inputs
from nemo_llm.data.index.build import IndexJob, build_index
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.index.plan import IndexSettings
from nemo_llm.storage.build_cache import build_once, content_key, file_sha256
from nemo_llm.tokenizers.tokenizer import Tokenizer

_MANY_BYTES = 1 << 26  # from here on, worker processes and the proof of the fast path are worth their seconds
_MAX_WORKERS = 16


def open_text(text: str, text_key: str, config: TokenizerConfig, tokenizer: Tokenizer, cache: Path) -> IndexedDataset:
    """Return the indexed dataset of a text file, folder, glob or asset, building it in the cache the first time.

    ``tokenizer`` is the one that ``config`` names. Raises InputError for missing files and for the first record that
    cannot be read (naming file and line).
    """
    files = expand_inputs(text)
    key = content_key(
        kind="text", files=[file_sha256(file) for file in files], text_key=text_key, tokenizer=tokenizer.fingerprint
    )
    settings = IndexSettings(
        tokenizer=config,
        text_key=text_key,
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
            cache=cache,
            workers=min(_MAX_WORKERS, os.cpu_count() or 1) if many else 0,
            fast_path=many,
        )
        return {"dataset": build_index(job)}

    folder = cache / f"text-{key}"
    build_once(folder, build)
    return IndexedDataset(folder / "data")
