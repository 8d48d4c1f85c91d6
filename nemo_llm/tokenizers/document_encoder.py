"""Documents of any length to arrays of ids in flat memory, by the fastest way proven to give the tokenizer's own ids.

Long documents are cut where the tokenizer would separate the two sides anyway: at a single space between two letters or
digits. That holds when no token of the vocabulary has a space after something else, and it is tried on real text
besides, by cutting it at every such place.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_llm.assets import resolve_path
from nemo_llm.corpus.documents import read_documents
from nemo_llm.tokenizers.tiktoken_encoder import FastBpe, NotProvenError, build_fast_bpe, check_texts
from nemo_llm.tokenizers.tokenizer import TIKTOKEN_PATTERNS, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer

CHUNK_CHARACTERS = 1 << 18
_SHORT_CHUNK_CHARACTERS = 1000  # SentencePiece is a third faster on these: its agenda stays in the processor's cache
# Of texts handed to the tokenizer at once: its offsets and ids take some 50 times as many bytes.
_BATCH_CHARACTERS = 1 << 20
_SPACE_INSIDE = re.compile("[^ ▁Ġ][ ▁Ġ]")  # as SentencePiece and byte-level BPE write a space
# Of `WordMemo`.
_MAX_WORDS = 500_000  # some 100 MB
_MAX_WORD_CHARACTERS = 64
_WINDOW = 50_000  # words after which the share of new ones is looked at
_MAX_NEW_FRACTION = 0.12  # above it, as in markup and lists, looking up costs more than it saves
_REST = 4_000_000  # characters for which it then stays out of use
_WORD_END = re.compile(r"(?<=\S) (?=\S)")


class DocumentEncoder:
    """Encodes documents for one tokenizer. ``way`` says how, for manifests and logs."""

    def __init__(
        self, tokenizer: Tokenizer, fast: FastBpe | None, way: str, chunk_characters: int = CHUNK_CHARACTERS
    ) -> None:
        self.tokenizer = tokenizer
        self.way = way
        self.fast = fast is not None
        self._fast = fast
        self._chunk = chunk_characters
        self._pattern = _compiled_pattern(tokenizer, fast)
        self.space_goes_right = _find_cut_rule(tokenizer)
        """At a cut: the space goes to the right side (true), is dropped (false), or the text cannot be cut (None)."""
        self._memo = _word_memo(tokenizer, self.space_goes_right)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Return the ids of each text, the same as ``tokenizer.encode`` of it."""
        results: list[NDArray[np.integer] | None] = [None] * len(texts)
        waiting: list[int] = []
        waiting_characters = 0
        for number, text in enumerate(texts):
            if self._memo is not None and len(text) <= CHUNK_CHARACTERS:
                results[number] = self._memo.encode(text)
                if results[number] is not None:
                    continue
            if len(text) > self._chunk:
                results[number] = np.concatenate(list(self.encode_blocks([text])))
                continue
            if self._fast is not None:
                results[number] = self._fast.encode(text)
            if results[number] is None:
                waiting.append(number)
                waiting_characters += len(text)
            if waiting_characters > _BATCH_CHARACTERS:
                self._encode_ordinary(texts, waiting, results)
                waiting, waiting_characters = [], 0
        self._encode_ordinary(texts, waiting, results)
        return [result for result in results if result is not None]

    def encode_blocks(self, blocks: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        """Yield the ids of one document given in blocks of text, piece by piece."""
        for chunk in self._chunks(blocks):
            fast = self._fast.encode(chunk) if self._fast is not None else None
            yield fast if fast is not None else _to_array(self.tokenizer.encode(chunk))

    def check(self, texts: Sequence[str]) -> str:
        """Compare the fast path with the tokenizer on texts of the corpus; return what differs, empty for nothing."""
        try:
            if self._fast is not None:
                check_texts(self.tokenizer, self._fast, texts)
        except NotProvenError as error:
            return str(error)
        return ""

    def _encode_ordinary(
        self, texts: Sequence[str], numbers: list[int], results: list[NDArray[np.integer] | None]
    ) -> None:
        if numbers:
            for number, ids in zip(numbers, self.tokenizer.encode_batch([texts[n] for n in numbers]), strict=True):
                results[number] = _to_array(ids)

    def _chunks(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cut a document into chunks whose ids can be put together. Linear in its length, whatever it holds."""
        rest, wanted = "", self._chunk
        waiting: list[str] = []
        waiting_characters = 0
        for block in blocks:
            waiting.append(block)
            waiting_characters += len(block)
            if len(rest) + waiting_characters <= wanted:
                continue
            rest, waiting, waiting_characters = rest + "".join(waiting), [], 0
            start = 0
            while len(rest) - start > wanted:
                end, resume = self._cut(rest, start, start + wanted)
                if end is None:  # look again in twice as much: an endless word costs no more than a few passes
                    wanted *= 2
                    continue
                yield rest[start:end]
                start, wanted = resume, self._chunk
            rest = rest[start:]
        rest += "".join(waiting)
        if rest:
            yield rest

    def _cut(self, text: str, start: int, stop: int) -> tuple[int | None, int]:
        """Return where the chunk from ``start`` ends and the next begins; (None, 0) when no place is certain."""
        if self.space_goes_right is not None:
            place = text.rfind(" ", start + 1, stop)
            while place > start:
                if text[place - 1].isalnum() and text[place + 1].isalnum():
                    return place, place if self.space_goes_right else place + 1
                place = text.rfind(" ", start + 1, place)
        if self._pattern is not None:
            # No such space (Chinese, base64, minified code): end where the tokenizer's own pieces end. The last few are
            # left, since what follows may lengthen them.
            starts = [match.start() for match in self._pattern.finditer(text, start, stop)][-3:]
            place = starts[0] if len(starts) == 3 else start
            if place > start and unicodedata.is_normalized("NFC", text[place - 1 : place + 1]):
                return place, place
        return None, 0


def _to_array(ids: list[int]) -> NDArray[np.int32]:
    return np.frombuffer(array("i", ids), dtype=np.int32)  # four times as fast as numpy's own reading of a list


def build_encoder(tokenizer: Tokenizer, cache: Path, *, fast: bool = True) -> DocumentEncoder:
    """Return the fastest encoder that gives the tokenizer's ids; the first time, a proof takes some seconds."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return DocumentEncoder(tokenizer, None, "tiktoken, the tokenizer's own library")
    if isinstance(tokenizer, SentencePieceTokenizer):
        return DocumentEncoder(
            tokenizer, None, "SentencePiece, by short pieces and a memory of words", _SHORT_CHUNK_CHARACTERS
        )
    if not fast:
        return DocumentEncoder(tokenizer, None, "ordinary: the fast path is switched off")
    try:
        encoder = build_fast_bpe(tokenizer, cache)
    except NotProvenError as error:
        return DocumentEncoder(tokenizer, None, f"ordinary: {error}")
    except ImportError:
        return DocumentEncoder(tokenizer, None, "ordinary: tiktoken is not installed")
    return DocumentEncoder(tokenizer, encoder, "tiktoken, proven to give the same ids")


def _find_cut_rule(tokenizer: Tokenizer) -> bool | None:
    """Try both ways to cut real text at spaces; return the one that keeps the ids, or None."""
    if any(_joins_words(token, tokenizer) for token in tokenizer.vocabulary()):
        return None
    document = next(iter(read_documents(resolve_path("asset:moby_dick", "text"), "text")))
    words = document.text[:20_000].split(" ")
    whole = tokenizer.encode(" ".join(words))
    for space_goes_right in (True, False):
        pieces = [words[0]]
        for word in words[1:]:
            if pieces[-1][-1:].isalnum() and word[:1].isalnum():
                pieces.append(" " + word if space_goes_right else word)
            else:
                pieces[-1] += " " + word
        if [number for piece in tokenizer.encode_batch(pieces) for number in piece] == whole:
            return space_goes_right
    return None


def _joins_words(token: str, tokenizer: Tokenizer) -> bool:
    """Return whether a token of the vocabulary has a letter or digit with a space after it."""
    if not _SPACE_INSIDE.search(token):
        return False
    number = tokenizer.token_id(token)
    text = token if number is None else tokenizer.decode([number])  # byte-level names do not show what is a letter
    return any(before.isalnum() and after == " " for before, after in pairwise(text))


def _word_memo(tokenizer: Tokenizer, space_goes_right: bool | None) -> "WordMemo | None":
    """Return a memory of words where it is sure to give the same ids."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or space_goes_right is not False:
        return None
    if any(_SPACE_INSIDE.search(piece) for piece in tokenizer.vocabulary()):
        return None
    memo = WordMemo(tokenizer)
    documents = read_documents(resolve_path("asset:shakespeare", "text"), "text")
    texts = [document.text for document in islice(documents, 3)]
    return memo if all(memo.encode(text).tolist() == tokenizer.encode(text) for text in texts) else None  # type: ignore[union-attr]


def _compiled_pattern(tokenizer: Tokenizer, fast: FastBpe | None) -> Any:
    """Return the expression by which the tokenizer splits text, if it is known."""
    import regex

    if fast is not None:
        return regex.compile(fast.pattern)
    if isinstance(tokenizer, TiktokenTokenizer):
        pattern = tokenizer.config.tiktoken_pattern or ""
        return regex.compile(TIKTOKEN_PATTERNS.get(pattern, pattern))
    return None


class WordMemo:
    """A memory of words for SentencePiece: ids of words that came before are looked up instead of searched for again.

    It holds where no piece of the vocabulary has a space after something else: then no merge and no path of the unigram
    lattice crosses a single space between two other characters, and the ids of a text are those of its words put
    together. The space itself is the one that SentencePiece puts before each word on its own. Both are checked before
    it is used. ``encode`` gives the ids of a text, or None while too many words are new for it to be worth its while.
    """

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
