"""What every kind of source does, and with what it is opened; its keys are in `nemo_llm.config.sections.sources`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nemo_llm.config.sections.data import DataConfig
from nemo_llm.config.sections.sources import FileSource, SourceSection
from nemo_llm.corpus.documents import expand_inputs
from nemo_llm.data.sources.split import SourcePart, cut_text
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenContext:
    """What the sources of a run are opened with, the same for all of them."""

    config: DataConfig
    tokenizer: Tokenizer
    cache: Path
    virtual_tokens: int
    """Negative ids that stand at the beginning of every conversation and labelled text."""
    classes: tuple[str, ...]
    """Names of the classes of the model's head; one name for scores."""
    vocab_size: int
    """Ids that the model knows: those of the tokenizer, or less."""


Entry = TypeVar("Entry", bound=SourceSection)


class SourceKind(ABC, Generic[Entry]):
    """A source of a blend. What its entry says alone (`kind`, `identity`, `check`, `packs`) is asked of the entry."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    @abstractmethod
    def open(self, context: OpenContext) -> TokenStore:
        """Its documents as tokens, built in the cache the first time.

        Raises:
            InputError: naming the source or the file that cannot be used.
        """

    @abstractmethod
    def unread_bytes(self) -> int:
        """Bytes that `open` reads in full when nothing of the source is in the cache."""

    def split(self, store: TokenStore, part: SourcePart, tokens_per_sample: int) -> tuple[TokenStore, tuple[int, int]]:
        """The store and the documents ``[first, last)`` in it that a set reads of the source.

        Args:
            tokens_per_sample: that the smallest sample of running text needs; 1 where samples are padded.

        Raises:
            InputError: the source does not give the set one sample; names source, set and the key to change.
        """
        return cut_text(self.entry.name, store, part, tokens_per_sample)


FileEntry = TypeVar("FileEntry", bound=FileSource)


class FileKind(SourceKind[FileEntry]):
    """A source whose files are read into the cache."""

    def unread_bytes(self) -> int:
        """All of the files."""
        return sum(file.stat().st_size for file in expand_inputs(self.entry.path))
