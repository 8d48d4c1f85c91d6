"""Looking at indexed datasets: validation, counts, lengths, documents as text; merging and splitting them."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_llm.data.index.format import IndexedDataset, IndexedDatasetWriter
from nemo_llm.errors import InputError
from nemo_llm.storage.atomic_files import write_json
from nemo_llm.storage.build_cache import file_sha256
from nemo_llm.tokenizers.tokenizer import Tokenizer

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of a dataset."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    bytes: int


def count(dataset: IndexedDataset) -> Counts:
    """Return the sizes of a dataset."""
    size = dataset.bin_path.stat().st_size + dataset.idx_path.stat().st_size
    return Counts(dataset.num_documents, len(dataset), dataset.num_tokens, dataset.dtype.name, size)


def validate(prefix: str, vocab_size: int | None) -> tuple[Counts, int]:
    """Read everything and return sizes and the largest token id.

    Raises InputError for a damaged file, or for an id beyond ``vocab_size``, naming the document that holds it.
    """
    dataset = IndexedDataset(prefix)
    largest = dataset.validate()
    if vocab_size is not None and largest >= vocab_size:
        for start in range(0, dataset.num_tokens, _CHUNK):
            wrong = np.nonzero(dataset.tokens[start : start + _CHUNK] >= vocab_size)[0]
            if wrong.size:
                place = start + int(wrong[0])
                raise InputError(
                    f"{dataset.bin_path}: document {dataset.document_at(place)} holds token id "
                    f"{int(dataset.tokens[place])}, beyond the {vocab_size} of the tokenizer"
                )
    return count(dataset), largest


def check_sums(prefix: str) -> list[str]:
    """Compare both files with the manifest's sizes and SHA-256; return what was checked.

    Raises InputError when there is no manifest or a file differs, naming it.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        raise InputError(f"{prefix}.manifest.json: no such file, so there is no sum to check against")
    checked = []
    for suffix, facts in manifest["files"].items():
        path = Path(f"{prefix}{suffix}")
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise InputError(f"{path}: missing, or not the {facts['bytes']} bytes of its manifest; rebuild the dataset")
        found = file_sha256(path)
        if found != facts["sha256"]:
            raise InputError(f"{path}: SHA-256 {found}, its manifest says {facts['sha256']}; the file is damaged")
        checked.append(f"{path}: {found}")
    return checked


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """Return the manifest beside a dataset, None when there is none; InputError when it is damaged."""
    path = Path(f"{prefix}.manifest.json")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: damaged manifest ({error})") from error
    return manifest


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Return the length in tokens of every document [number of documents]."""
    if len(dataset) == dataset.num_documents:
        return dataset.sequence_lengths.astype(np.int64)
    starts = [dataset.document_start(number) for number in range(dataset.num_documents + 1)]
    return np.diff(np.asarray(starts, dtype=np.int64)).astype(np.int64)


def histogram(dataset: IndexedDataset, width: int = 40) -> str:
    """Return a text histogram of document lengths by powers of two, with quantiles below it."""
    lengths = document_lengths(dataset)
    if not lengths.size:
        return "no documents"
    bins = np.bincount(np.frexp(np.maximum(lengths, 0))[1])
    lines = [f"{'tokens':>21}  {'documents':>12}"]
    for power, number in enumerate(bins):
        low, high = (0, 0) if power == 0 else (1 << (power - 1), (1 << power) - 1)
        if number:
            lines.append(f"{f'{low:,}-{high:,}':>21}  {number:>12,} {'#' * int(np.ceil(number / bins.max() * width))}")
    quantiles = np.quantile(lengths, [0, 0.05, 0.5, 0.95, 1]).astype(int)
    names = ("min", "5%", "median", "95%", "max")
    lines.append(", ".join(f"{name} {value:,}" for name, value in zip(names, quantiles, strict=True)))
    return "\n".join([*lines, f"mean {lengths.mean():,.1f}, empty {int((lengths == 0).sum()):,}"])


def decode(dataset: IndexedDataset, numbers: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of documents; raises InputError for a number or token id that does not exist."""
    for number in numbers:
        if not 0 <= number < dataset.num_documents:
            raise InputError(f"document {number}: {dataset.prefix} has documents 0 to {dataset.num_documents - 1}")
        ids = dataset.document(number)
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise InputError(
                f"document {number}: token id {int(ids.max())} is beyond the tokenizer's {tokenizer.vocab_size}; name "
                "the tokenizer that made the dataset"
            )
        yield number, tokenizer.decode(ids.tolist())


def merge(output: str, prefixes: Sequence[str]) -> Counts:
    """Write one dataset with the documents of several, in order; InputError when they do not go together."""
    manifests = [read_manifest(prefix) for prefix in prefixes]
    prints = {m["tokenizer"]["fingerprint"]: p for p, m in zip(prefixes, manifests, strict=True) if m is not None}
    if len(prints) > 1:
        raise InputError(f"{' and '.join(prints.values())} were made with different tokenizers")
    _refuse_existing(output)
    with IndexedDatasetWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.append_dataset(prefix)
    if all(manifest is not None for manifest in manifests):
        _write_manifest(output, [manifest for manifest in manifests if manifest is not None], prefixes)
    return count(IndexedDataset(output))


def split(prefix: str, shares: Sequence[float], outputs: Sequence[str]) -> list[Counts]:
    """Write the documents of one dataset, in order, to several by shares of documents (they need not sum to 1)."""
    dataset = IndexedDataset(prefix)
    ends = np.round(np.cumsum(shares) / sum(shares) * dataset.num_documents).astype(int)
    manifest = read_manifest(prefix)
    for output in outputs:
        _refuse_existing(output)
    for start, end, output in zip([0, *ends[:-1]], ends, outputs, strict=True):
        with IndexedDatasetWriter(output, dataset.dtype) as writer:
            for number in range(start, end):
                first, last = (int(dataset.document_indices[n]) for n in (number, number + 1))
                writer.add_document(dataset.document(number), dataset.sequence_lengths[first:last].tolist())
        if manifest is not None:
            _write_manifest(output, [manifest], [prefix])
    return [count(IndexedDataset(output)) for output in outputs]


def _refuse_existing(output: str) -> None:
    if os.path.exists(f"{output}.idx"):
        raise InputError(f"{output}.idx exists; choose another name or remove it")


def _write_manifest(output: str, manifests: Sequence[dict[str, Any]], sources: Sequence[str]) -> None:
    """Write the manifest of a dataset made from others: their tokenizer, its own sums."""
    dataset = IndexedDataset(output)
    largest = max((int(dataset.tokens[s : s + _CHUNK].max()) for s in range(0, dataset.num_tokens, _CHUNK)), default=-1)
    files = {
        path.suffix: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in (dataset.bin_path, dataset.idx_path)
    }
    write_json(
        Path(f"{output}.manifest.json"),
        {
            "format": 1,
            "made_by": "tools/inspect_dataset.py",
            "dtype": dataset.dtype.name,
            "documents": dataset.num_documents,
            "tokens": dataset.num_tokens,
            "max_token_id": largest,
            "files": files,
            "tokenizer": manifests[0]["tokenizer"],
            "sources": [{"path": source} for source in sources],
        },
    )
