"""From tokens and the places where documents start to a ``Sample``: masks, positions, fill-in-the-middle."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_llm.config.sections.data import DataConfig, SeqLengthRamp
from nemo_llm.data.sampling.fim import FimRules, build_fim_rules
from nemo_llm.data.sampling.keyed_permutation import mix64
from nemo_llm.data.sampling.sample import Sample
from nemo_llm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Window:
    """The raw material of a sample: ``s + 1`` tokens of documents and pieces of documents, one after the other."""

    tokens: NDArray[np.int64]
    """[s + 1]; after ``length``, padding."""
    starts: NDArray[np.int64]
    """Where each document or piece begins; the first is 0."""
    length: int
    """Tokens that are not padding."""
    runs_on: bool
    """Whether the label of a document's last token may be the next one's first (text that simply runs on)."""
    learned: NDArray[np.float32] | None = None
    """[s + 1]: 1 for tokens that are learned, where some are not (the questions of a chat)."""
    targets: NDArray[np.float32] | None = None
    """[s + 1]: classes or scores in the place of the tokens that are learned."""


class SampleRules:
    """How a window becomes a sample. The arrays that samples have in common are shared and read-only."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.seq_length = config.seq_length
        self.eod_id = tokenizer.eod_id
        self._reset_position_ids = config.reset_position_ids
        self._reset_attention_mask = config.reset_attention_mask
        self._eod_mask_loss = config.eod_mask_loss
        self._fim: FimRules | None = build_fim_rules(config.fim, tokenizer)
        self._ramp: SeqLengthRamp | None = config.seq_length_ramp
        self._positions = _read_only(np.arange(config.seq_length, dtype=np.int64))
        self._ones = _read_only(np.ones(config.seq_length, dtype=np.float32))
        self.needs_starts = config.reset_position_ids or config.reset_attention_mask or config.fim is not None
        """Whether a window's document starts are used at all (looking them up takes time)."""

    def sample(self, window: Window, key: int, index: int) -> Sample:
        """Return the sample of a window. ``key`` seeds what is random in it; ``index`` is its number in the run."""
        if self._fim is not None:
            window = self._fill_in_the_middle(window, self._fim, key)
        loss_mask, position_ids, document_ids = self._ones, self._positions, None
        if self._eod_mask_loss or window.length <= self.seq_length or not window.runs_on:
            loss_mask = self._loss_mask(window)
        starts = window.starts[window.starts < self.seq_length]
        resets_positions, resets_attention = self._reset_position_ids, self._reset_attention_mask
        chunk = self._chunk_length(index)
        if chunk < self.seq_length:  # a shorter context: the sample falls into stretches that do not see each other
            starts = np.union1d(starts if self.needs_starts else starts[:1], np.arange(0, self.seq_length, chunk))
            resets_positions = resets_attention = True
        if resets_positions or resets_attention:
            lengths = np.diff(np.append(starts, self.seq_length))
            if resets_positions:
                position_ids = self._positions - np.repeat(starts, lengths)
            if resets_attention:
                document_ids = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
        labels = None if window.targets is None else window.targets[1:]
        padding = self._positions >= window.length if window.length < self.seq_length else None
        return Sample(window.tokens, loss_mask, position_ids, document_ids, labels, padding)

    def _loss_mask(self, window: Window) -> NDArray[np.float32]:
        mask = np.ones(self.seq_length, dtype=np.float32)
        mask[max(0, window.length - 1) :] = 0  # labels that are padding
        if not window.runs_on:
            mask[window.starts[1:] - 1] = 0  # labels that belong to another document
        if window.learned is not None:
            mask *= window.learned[1:]
        if self._eod_mask_loss:
            mask[window.tokens[:-1] == self.eod_id] = 0
        return mask

    def _chunk_length(self, index: int) -> int:
        """Return the context length of sample ``index``: doubling from the ramp's start, in equal shares of samples."""
        ramp = self._ramp
        if ramp is None or index >= ramp.ramp_samples:
            return self.seq_length
        doublings = 0
        while ramp.start_seq_length << doublings < self.seq_length:
            doublings += 1
        return min(self.seq_length, ramp.start_seq_length << (index * doublings // ramp.ramp_samples))

    def _fill_in_the_middle(self, window: Window, fim: FimRules, key: int) -> Window:
        ends = np.append(window.starts[1:], window.length)
        pieces, starts, position = [], [], 0
        for number, (start, end) in enumerate(zip(window.starts, ends, strict=True)):
            document = window.tokens[start:end]
            whole = len(document) > 0 and int(document[-1]) == self.eod_id
            body = fim.apply(document[:-1] if whole else document, mix64(key + number))
            pieces += [body, document[-1:] if whole else document[:0]]
            starts.append(position)
            position += len(body) + whole
        size = self.seq_length + 1
        padding = np.full(max(0, size - position), self.eod_id, dtype=np.int64)
        tokens = np.concatenate([*pieces, padding])[:size]
        kept = [start for start in starts if start < size]
        return Window(tokens, np.asarray(kept, dtype=np.int64), min(position, size), window.runs_on)


def _read_only(array: NDArray) -> NDArray:
    array.setflags(write=False)
    return array
