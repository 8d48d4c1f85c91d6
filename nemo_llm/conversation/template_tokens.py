"""Token ids of what a chat template wrote: control tokens by their names, with any kind of tokenizer."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from nemo_llm.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer

# Stands in a template's text for the end-of-document token where no name is read as it. It is half of a surrogate
# pair and no character, so that no message can hold it.
END_MARK = "\ud800"

PlacedToken = tuple[int, int, int]
"""Id, and the stretch of text (first character, one past the last) that it was made of."""


class TemplateEncoder:
    """Encodes templates' texts. Names of control tokens become these tokens, in messages too (as in transformers)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._backend: Any = None
        self._names = {END_MARK: tokenizer.eod_id}
        if isinstance(tokenizer, HuggingFaceTokenizer):
            from tokenizers import Tokenizer as Backend

            # A copy of its own that reads special tokens by name.
            self._backend = Backend.from_str(tokenizer.backend.to_str())
            self._backend.encode_special_tokens = False
        else:
            self._names |= tokenizer.control_tokens()
        longest_first = sorted(self._names, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.eod_name = self._find_eod_name()
        """The name that is read as the end-of-document token; None where there is none."""

    @property
    def eod_text(self) -> str:
        """What a template writes for the end-of-document token."""
        return END_MARK if self.eod_name is None else self.eod_name

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [token for token, _, _ in self.encode_placed(text, ())]

    def encode_placed(self, text: str, edges: Sequence[int]) -> list[PlacedToken]:
        """Ids of a text, each with its place.

        A tokenizer that does not say where a token stood encodes the stretches between ``edges`` by themselves.
        """
        placed: list[PlacedToken] = []
        start = 0
        for piece in self._control.split(text):
            stop = start + len(piece)
            if piece in self._names:
                placed.append((self._names[piece], start, stop))
            elif piece and self._backend is not None:
                encoding = self._backend.encode(piece, add_special_tokens=False)
                placed += [
                    (token, start + low, start + high)
                    for token, (low, high) in zip(encoding.ids, encoding.offsets, strict=True)
                ]
            elif piece:
                cuts = sorted({start, stop, *(edge for edge in edges if start < edge < stop)})
                for low, high in pairwise(cuts):
                    placed += [(token, low, high) for token in self.tokenizer.encode(text[low:high])]
            start = stop
        return placed

    def _find_eod_name(self) -> str | None:
        return next((name for name in self._possible_eod_names() if self.encode(name) == [self.tokenizer.eod_id]), None)

    def _possible_eod_names(self) -> Iterator[str]:
        yield from (name for name, token in self._names.items() if token == self.tokenizer.eod_id and name != END_MARK)
        if decoded := self.tokenizer.decode([self.tokenizer.eod_id]):
            yield decoded
