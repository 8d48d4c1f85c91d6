"""Raw text named in a blend: tokenised once into the cache and opened as an indexed dataset."""

from pathlib import Path

from nemo_llm.assets import ASSET_PREFIX, resolve_path
from nemo_llm.data.cache import build_once, content_key, file_sha256
from nemo_llm.data.documents import expand_inputs, read_documents
from nemo_llm.data.indexed import IndexedDataset, IndexedDatasetWriter, token_dtype
from nemo_llm.data.tokenizer import Tokenizer
from nemo_llm.errors import InputError

_BATCH = 64


def open_text(text: str, text_key: str, tokenizer: Tokenizer, cache: Path) -> IndexedDataset:
    """Return the indexed dataset of a text file, glob or asset, building it in the cache the first time.

    Raises InputError for missing files and for records that cannot be read (naming file and line).
    """
    files = [resolve_path(text, "text")] if text.startswith(ASSET_PREFIX) else expand_inputs(text)
    key = content_key(
        kind="text", files=[file_sha256(file) for file in files], text_key=text_key, tokenizer=tokenizer.fingerprint
    )
    folder = cache / f"text-{key}"
    build_once(folder, lambda temporary: _tokenise(files, text_key, tokenizer, temporary))
    return IndexedDataset(folder / "data")


def _tokenise(files: list[Path], text_key: str, tokenizer: Tokenizer, folder: Path) -> dict:
    with IndexedDatasetWriter(folder / "data", token_dtype(tokenizer.vocab_size)) as writer:
        batch: list[str] = []
        for file in files:
            for document in read_documents(file, text_key):
                batch.append(document.text)
                if len(batch) == _BATCH:
                    _write(batch, tokenizer, writer)
                    batch = []
        _write(batch, tokenizer, writer)
    if not writer.num_documents:
        raise InputError(f"{', '.join(map(str, files))}: no text in these files")
    return {
        "sources": [str(file) for file in files],
        "tokenizer": tokenizer.fingerprint,
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
    }


def _write(texts: list[str], tokenizer: Tokenizer, writer: IndexedDatasetWriter) -> None:
    for ids in tokenizer.encode_batch(texts):
        writer.add_document([*ids, tokenizer.eod_id])
