"""Sources that are indexed datasets, and the check that their tokens are those of the run's tokenizer and model."""

import json
from pathlib import Path

from nemo_llm.config.sections.sources import IndexedSource
from nemo_llm.corpus.documents import as_path
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.sources.kind import OpenContext, SourceKind
from nemo_llm.errors import InputError
from nemo_llm.storage.build_cache import build_once, content_key
from nemo_llm.tokenizers.tokenizer import Tokenizer


class IndexedKind(SourceKind[IndexedSource]):
    """Tokens that ``tools/index_dataset.py`` has written."""

    def open(self, context: OpenContext) -> IndexedDataset:
        """Map the files.

        Raises:
            InputError: missing or damaged files; another tokenizer's tokens; ids beyond a vocabulary.
        """
        return checked(IndexedDataset(self.entry.path), self.entry.name, context)

    def unread_bytes(self) -> int:
        """Those of the tokens, where no manifest says which id is the largest."""
        if as_path(f"{self.entry.path}.manifest.json").is_file():
            return 0
        return as_path(f"{self.entry.path}.bin").stat().st_size


def checked(dataset: IndexedDataset, name: str, context: OpenContext) -> IndexedDataset:
    """The dataset of the source ``name``, unless it was made with another tokenizer or holds ids beyond a vocabulary.

    Raises:
        InputError: it was, or does.
    """
    tokenizer = context.tokenizer
    largest = _largest_token(dataset, name, tokenizer, context.cache)
    found = f"source {name}: {dataset.bin_path} holds token id {largest}, but"
    if largest >= tokenizer.vocab_size:
        raise InputError(
            f"{found} the tokenizer has {tokenizer.vocab_size} ids; set data.tokenizer to the one that made this "
            "dataset"
        )
    if largest >= context.vocab_size:
        raise InputError(
            f"{found} the model knows {context.vocab_size}; set model.vocab_size to {largest + 1} or more, or to null"
        )
    return dataset


def _largest_token(dataset: IndexedDataset, name: str, tokenizer: Tokenizer, cache: Path) -> int:
    """Return the largest id, from the dataset's manifest, an earlier scan, or a full scan made once."""
    manifest_path = Path(dataset.prefix + ".manifest.json")
    sizes = {path.suffix: path.stat().st_size for path in (dataset.idx_path, dataset.bin_path)}
    if manifest_path.is_file():
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            recorded = {suffix: manifest["files"][suffix]["bytes"] for suffix in sizes}
            fingerprint, largest = manifest["tokenizer"]["fingerprint"], int(manifest["max_token_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest_path}: damaged manifest ({error!r}); remove it or rebuild the data") from error
        if recorded != sizes:
            raise InputError(f"{dataset.prefix}: files have {sizes} bytes, the manifest says {recorded}; rebuild")
        if fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"source {name}: {dataset.prefix} was made with tokenizer {manifest['tokenizer'].get('name')} "
                f"({fingerprint[:12]}), the run uses another one ({tokenizer.fingerprint[:12]}); set data.tokenizer to "
                "the one of the data, or index the text again"
            )
        return largest
    key = content_key(kind="scan", dataset=dataset.identity)
    return int(build_once(cache / f"scan-{key}", lambda _: {"max_token_id": dataset.validate()})["max_token_id"])
