"""What a data source gives: samples by number. Shapes: ``s`` is the sequence length."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample. The arrays may be shared between samples and are read-only."""

    tokens: NDArray[np.int64]
    """[s + 1]: inputs are ``tokens[:-1]``, labels ``tokens[1:]``."""
    loss_mask: NDArray[np.float32]
    """[s]: 1 where the label counts for the loss."""
    position_ids: NDArray[np.int64]
    """[s]."""
    document_ids: NDArray[np.int32] | None
    """[s]: number of the document within the sample; a token attends only to its own. None: no document mask."""
    labels: NDArray[np.float32] | None = None
    """[s]: classes or scores, where the label is not the next token; they count where the loss mask says so."""
    padding: NDArray[np.bool_] | None = None
    """[s]: True where the sample holds nothing. None: it is full."""

    @property
    def learned_labels(self) -> NDArray:
        """The labels that count for the loss: tokens, classes or scores."""
        labels = self.tokens[1:] if self.labels is None else self.labels
        return labels[self.loss_mask > 0]


class SampleSource(Protocol):
    """Samples by number, a pure function of it; training sources never end, validation sources have a length."""

    seq_length: int

    def __getitem__(self, index: int) -> Sample:
        """Return one sample; raises IndexError beyond the length of a finite source."""
        ...

    def __len__(self) -> int:
        """Return the number of samples of a finite source (TypeError for an endless one)."""
        ...
