"""From tokens to text while they come: pieces that are whole characters, and stop strings."""

from collections.abc import Sequence

from nemo_llm.tokenizers.tokenizer import Tokenizer

_CONTEXT_TOKENS = 5
_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are no whole character yet


class TextStream:
    """The text that one row's new tokens make.

    A token is decoded together with a few before it: some tokenizers write a word's first space only when something
    stands before the word.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        """A stop string was found; ``text`` ends before it."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._read = len(self._tokens)
        self._prefix = 0
        self._shown = 0

    def add(self, token: int) -> None:
        """Take in the next token."""
        self._tokens.append(token)
        known = self._tokenizer.decode(self._tokens[self._prefix : self._read])
        extended = self._tokenizer.decode(self._tokens[self._prefix :])
        # Wait for the rest of a character; one token of bytes that are none at all must not hold up the text for ever.
        if extended.endswith(_INCOMPLETE) and len(self._tokens) - self._read < _CONTEXT_TOKENS:
            return
        self._take(extended[len(known) :])

    def finish(self) -> None:
        """No more tokens: what was held back is text."""
        if not self.stopped and self._read < len(self._tokens):
            known = self._tokenizer.decode(self._tokens[self._prefix : self._read])
            self._take(self._tokenizer.decode(self._tokens[self._prefix :])[len(known) :])

    def news(self, final: bool = False) -> str:
        """Text that was not returned before and that no stop string can take back."""
        end = len(self.text)
        if not final and not self.stopped:
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _take(self, piece: str) -> None:
        self._prefix, self._read = self._read, len(self._tokens)
        start = len(self.text)
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, max(0, start - len(stop) + 1))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
