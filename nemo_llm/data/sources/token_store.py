"""Where tokens come from: what samples are cut from, whatever kind of source it was opened from."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray


class TokenStore(ABC):
    """Documents of tokens one after the other."""

    prefix: str
    """Path of its files, or what stands for it."""
    num_tokens: int
    num_documents: int
    _starts: NDArray[np.int64]
    """Where each document begins, and the number of tokens; unless the two methods that read it are overridden."""
    has_learned: bool = False
    """Whether `read_learned` says which tokens are learned; else all are."""
    has_targets: bool = False
    """Whether each document has a `target`."""
    chat_template: str | None = None
    """The template that conversations were written with, as a checkpoint keeps it."""

    @property
    def identity(self) -> object:
        """What names the content: anything that JSON holds."""
        return self.prefix

    @abstractmethod
    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` as int64 [count]."""

    def document_start(self, document: int) -> int:
        """Return the position of a document's first token; for ``num_documents``, the number of tokens."""
        return int(self._starts[document])

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at a position."""
        return int(np.searchsorted(self._starts, token, side="right")) - 1

    def first_document(self, share: float) -> int:
        """The first document behind this share of the source, where a split cuts it."""
        return round(share * self.num_documents)

    def read_learned(self, start: int, count: int) -> NDArray[np.float32]:
        """Return 1 for each of ``count`` tokens that is learned, else 0, as float32 [count]."""
        raise NotImplementedError

    def target(self, document: int) -> float:
        """Number of the class, or the score, of a document."""
        raise NotImplementedError
