"""A memory of words for SentencePiece: ids of words that came before are looked up instead of searched for again.

It holds where no piece of the vocabulary has a space after something else: then no merge and no path of the unigram
lattice crosses a single space between two other characters, and the ids of a text are those of its words put together.
The space itself is the one that SentencePiece puts before each word on its own. Both are checked before it is used.
"""

import re
from array import array

import numpy as np
from numpy.typing import NDArray

from nemo_llm.tokenizers.tokenizer import SentencePieceTokenizer

_MAX_WORDS = 500_000  # some 100 MB
_MAX_WORD_CHARACTERS = 64
_WINDOW = 50_000  # words after which the share of new ones is looked at
_MAX_NEW_FRACTION = 0.12  # above it, as in markup and lists, looking up costs more than it saves
_REST = 4_000_000  # characters for which it then stays out of use
_WORD_END = re.compile(r"(?<=\S) (?=\S)")


class WordMemo:
    """``encode`` gives the ids of a text, or None while too many words are new for it to be worth its while."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._words = _Words(tokenizer)
        self._seen = 0
        self._resting = 0

    def encode(self, text: str) -> NDArray[np.int32] | None:
        """Return the ids [n] of a text, the same as the tokenizer's."""
        if self._resting > 0:
            self._resting -= len(text)
            return None
        words = _WORD_END.split(text)
        ids = b"".join(map(self._words.__getitem__, words))
        self._seen += len(words)
        if self._seen >= _WINDOW:
            if self._words.new > _MAX_NEW_FRACTION * self._seen and len(self._words) >= _WINDOW:
                self._resting = _REST
            self._seen = self._words.new = 0
        return np.frombuffer(ids, dtype=np.int32)


class _Words(dict[str, bytes]):
    """Ids of words as bytes of int32; a word that is missing is encoded, and kept while there is room."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        super().__init__()
        self._encode = tokenizer.encode
        self.new = 0

    def __missing__(self, word: str) -> bytes:
        self.new += 1
        ids = array("i", self._encode(word)).tobytes()
        if len(word) <= _MAX_WORD_CHARACTERS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
