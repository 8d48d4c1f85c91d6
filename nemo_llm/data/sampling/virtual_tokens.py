"""Room for prompt tuning's virtual tokens in front of every sample of running text."""

import dataclasses

import numpy as np

from nemo_llm.data.sampling.sample import Sample
from nemo_llm.data.sampling.token_windows import Source


class VirtualTokenSource:
    """A source whose samples begin with ids ``-1, -2, ...``, which stand for virtual tokens and carry no loss.

    ``inner`` gives samples shorter by their number.
    """

    def __init__(self, inner: Source, num_tokens: int) -> None:
        self._inner = inner
        self._ids = -1 - np.arange(num_tokens, dtype=np.int64)
        self.name, self.place = inner.name, inner.place
        self.seq_length = inner.seq_length + num_tokens
        self.num_documents, self.num_tokens = inner.num_documents, inner.num_tokens
        self.samples_per_epoch, self.tokens_per_sample = inner.samples_per_epoch, inner.tokens_per_sample

    def sample(self, index: int, run_index: int) -> Sample:
        """Return sample ``index`` of the source, which is number ``run_index`` of the run."""
        sample, count = self._inner.sample(index, run_index), len(self._ids)
        documents, padding = sample.document_ids, sample.padding
        return dataclasses.replace(
            sample,
            tokens=np.concatenate((self._ids, sample.tokens)),
            loss_mask=np.concatenate((np.zeros(count, dtype=np.float32), sample.loss_mask)),
            position_ids=np.concatenate((np.arange(count, dtype=np.int64), sample.position_ids + count)),
            document_ids=None
            if documents is None
            else np.concatenate((np.zeros(count, dtype=documents.dtype), documents)),
            padding=None if padding is None else np.concatenate((np.zeros(count, dtype=np.bool_), padding)),
        )

    def documents_of(self, index: int) -> list[tuple[int, int]]:
        """Return the ranges of documents in sample ``index``."""
        return self._inner.documents_of(index)
