"""A faster encoder for byte-level BPE tokenizers, used only where it is proven to give the same ids.

``tiktoken`` merges byte pairs by the rank of their concatenation; Hugging Face's ``tokenizers`` merges listed pairs in
the order of the list. The two agree for a tokenizer when
1. for every merge ``(l, r)``, merging the bytes of ``l + r`` by lower ranks alone ends in exactly ``[l, r]``. Then
   ``tiktoken`` never joins a pair that is not listed: when it joins ``x`` and ``y``, no earlier merge crossed their
   ends, so their bytes went through the same merges as they do alone;
2. both split text at the same places before merging: one regular expression, run by two engines whose Unicode tables
   may differ. Every code point beyond ASCII is tried against a letter, a digit, a sign and spaces; documents with one
   that the engines see differently take the ordinary path;
3. nothing else touches the text (normalisers other than NFC, prefixes, added tokens that occur in the document).
Points 1 and 2 are checked once per tokenizer, and the ids compared on real text and on random strings besides.

Most of tiktoken's time goes into the expression's last part, ``\\s+(?!\\S)|\\s+``: a run of white space before a word
leaves its last character to the word, and for the look-ahead the whole expression runs on a backtracking engine. Here a
marker is put at that place beforehand, the look-ahead is dropped, and the marker's id afterwards: the same pieces, from
an automaton.
"""

import json
import random
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_llm.assets import asset_names, resolve_path
from nemo_llm.corpus.documents import read_documents
from nemo_llm.storage.build_cache import build_once, content_key
from nemo_llm.tokenizers.tokenizer import TIKTOKEN_PATTERNS, HuggingFaceTokenizer, Tokenizer

_MARKER = "\ue000"  # private use: no text has it, and one that does takes the ordinary path
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space, which \s is
_PROBES = "b1. \n"
_FUZZ_ALPHABET = (
    *("  ", "\n\n", " \n", "\r\n", "'s", "'LL", "'ve", "\u017f", "é", "e\u0301", "日本"),
    *("🎉", "👩‍👩‍👧", "\u00a0", "\u200b", "\u3000", "Ⅷ", "²", "١٢", "ß", "İ", "\u212a", "\x00", "ก็"),
    *("\x1c", "\x85", "\u2028", " \t", "\t ", "\n ", "\n\n ", " \r\n", "\u00a0 ", "   "),
    *"abcXYZ019 .,'-_/\t\n\r\"",
)


class NotProvenError(Exception):
    """The fast encoder does not serve this tokenizer; the message says why."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """A byte-level BPE tokenizer as tiktoken sees it."""

    pattern: str
    tokens: list[bytes]
    """By rank: 256 bytes, then what each merge makes."""
    merges: list[tuple[bytes, bytes]]
    """In order; left out once they are checked."""
    id_of_rank: NDArray[np.int32]
    added_tokens: tuple[str, ...]
    nfc: bool


class FastBpe:
    """``encode`` gives the same ids as the tokenizer, or None for a text that must take the ordinary path."""

    def __init__(self, spec: _Spec, different: str) -> None:
        """``different`` holds the characters that the two engines class differently."""
        import tiktoken

        self.pattern = spec.pattern
        simple = _without_look_ahead(spec.pattern)
        self._marker_rank = len(spec.tokens) if simple is not None else None
        ranks = {token: rank for rank, token in enumerate(spec.tokens)}
        if simple is not None:
            ranks[_MARKER.encode()] = len(spec.tokens)
        pattern = simple if simple is not None else spec.pattern
        self._encoding = tiktoken.Encoding(name="fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        identity = bool((spec.id_of_rank == np.arange(len(spec.id_of_rank))).all())
        self._id_of_rank = None if identity else spec.id_of_rank
        self._added_tokens = spec.added_tokens
        self._nfc = spec.nfc
        self._different = re.compile(f"[{re.escape(different)}]") if different else None
        # After a newline, some expressions let the run end where it stands.
        last = _SPACE.replace(r"\t-\r", r"\t\x0b\x0c") if r"[\r\n]" in spec.pattern else _SPACE
        self._mark = re.compile(f"[{_SPACE}](?=[{last}][^{_SPACE}])").sub

    def encode(self, text: str) -> NDArray[np.integer] | None:
        """Return the ids [n] of a text, or None when it holds something that the proof leaves out."""
        if any(token in text for token in self._added_tokens):
            return None
        if not text.isascii():
            if _MARKER in text or (self._different is not None and self._different.search(text)):
                return None
            if self._nfc and not unicodedata.is_normalized("NFC", text):
                return None
        if self._marker_rank is not None:
            text = self._mark(_append_marker, text)
        ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        if self._marker_rank is not None:
            ranks = ranks[ranks != self._marker_rank]
        return ranks if self._id_of_rank is None else self._id_of_rank[ranks]


def _append_marker(match: re.Match[str]) -> str:
    return match.group() + _MARKER


def _without_look_ahead(pattern: str) -> str | None:
    """Return the expression with a marker in place of its look-ahead; None when it is not of the known form."""
    if pattern == TIKTOKEN_PATTERNS["r50k_base"]:
        pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    head = pattern.removesuffix(r"|\s+(?!\S)|\s+")
    if head == pattern or re.search(r"[+*?]\+|\d\}\+|\(\?[=!<]", head):  # possessive or another look-around
        return None
    for signs in (r"[^\s\p{L}\p{N}]", r"[^\r\n\p{L}\p{N}]"):  # classes that would take the marker in
        head = head.replace(signs, f"{signs[:-1]}{_MARKER}]")
    return f"{_MARKER}|{head}|\\s+"


def build_fast_bpe(tokenizer: Tokenizer, cache: Path) -> FastBpe:
    """Return a proven fast encoder; the proof takes seconds and is kept in the cache by tokenizer and versions.

    Raises NotProvenError, with the reason, when the tokenizer is of another kind or the proof fails.
    """
    import tiktoken
    import tokenizers

    versions = [tiktoken.__version__, tokenizers.__version__, unicodedata.unidata_version]
    key = content_key(kind="fast_bpe", tokenizer=tokenizer.fingerprint, versions=versions, format=3)
    folder = cache / f"proof-{key}"
    proof = build_once(folder, lambda temporary: _prove(tokenizer, temporary))
    if proof["failure"]:
        raise NotProvenError(proof["failure"])
    return FastBpe(_load_spec(folder), proof["different"])


def _prove(tokenizer: Tokenizer, folder: Path) -> dict:
    """Write the tokenizer as tiktoken sees it, and return the facts of the proof.

    ``failure`` is empty when it holds; ``different`` are the characters to leave out.
    """
    try:
        spec = _read_spec(tokenizer)
        _check_merges(spec)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        different = _differing_characters(tokenizer.backend, spec.pattern)
        check_texts(tokenizer, FastBpe(spec, different), [*_fuzz_texts(), *_shipped_texts()])
    except NotProvenError as error:
        return {"failure": str(error), "different": ""}
    _save_spec(spec, folder)
    return {"failure": "", "different": different, "merges": len(spec.merges)}


def _save_spec(spec: _Spec, folder: Path) -> None:
    saved = {
        "pattern": spec.pattern,
        "tokens": [token.decode("latin-1") for token in spec.tokens],
        "id_of_rank": spec.id_of_rank.tolist(),
        "added_tokens": spec.added_tokens,
        "nfc": spec.nfc,
    }
    (folder / "spec.json").write_text(json.dumps(saved), encoding="utf-8")


def _load_spec(folder: Path) -> _Spec:
    saved = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    return _Spec(
        pattern=saved["pattern"],
        tokens=[token.encode("latin-1") for token in saved["tokens"]],
        merges=[],
        id_of_rank=np.asarray(saved["id_of_rank"], dtype=np.int32),
        added_tokens=tuple(saved["added_tokens"]),
        nfc=saved["nfc"],
    )


def _read_spec(tokenizer: Tokenizer) -> _Spec:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise NotProvenError(f"{type(tokenizer).__name__} is not a tokenizer.json")
    description = json.loads(tokenizer.backend.to_str())
    model, normalizer = description["model"], description["normalizer"]
    plain = {"dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False}
    if model["type"] != "BPE" or any((model.get(name) or None) != (value or None) for name, value in plain.items()):
        raise NotProvenError("not a plain BPE model")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotProvenError("tokens have a prefix or suffix")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise NotProvenError(f"text is normalised by {normalizer['type']}")
    tokens, merges, id_of_rank = _ranks(model)
    # With parse_special_tokens off, special tokens in raw text are plain text to both.
    added = tuple(
        token["content"]
        for token in description["added_tokens"]
        if not token["special"] or tokenizer.config.parse_special_tokens
    )
    return _Spec(_pattern(description["pre_tokenizer"]), tokens, merges, id_of_rank, added, normalizer is not None)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """Return the regular expression that splits the text."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise NotProvenError("not byte-level, or a space is put before the text")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return TIKTOKEN_PATTERNS["r50k_base"]  # what ByteLevel's own expression does
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return split["pattern"]["Regex"]
    raise NotProvenError("text is not split by one regular expression")


def _ranks(model: dict[str, Any]) -> tuple[list[bytes], list[tuple[bytes, bytes]], NDArray[np.int32]]:
    characters = _byte_characters()
    byte_of = {character: byte for byte, character in characters.items()}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes(byte_of[character] for character in token)
        except KeyError as error:
            raise NotProvenError(f"token {token!r} is not made of bytes") from error

    vocab = model["vocab"]
    try:
        ids = [vocab[characters[byte]] for byte in range(256)]
        tokens = [bytes([byte]) for byte in range(256)]
        merges = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ids.append(vocab[left + right])
            merges.append((to_bytes(left), to_bytes(right)))
            tokens.append(merges[-1][0] + merges[-1][1])
    except KeyError as error:
        raise NotProvenError(f"{error} is not in the vocabulary") from error
    if len(set(tokens)) != len(tokens):
        raise NotProvenError("two merges make the same token")
    return tokens, merges, np.asarray(ids, dtype=np.int32)


def _byte_characters() -> dict[int, str]:
    """GPT-2's visible characters for the 256 bytes (openai/gpt-2, ``bytes_to_unicode``)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _check_merges(spec: _Spec) -> None:
    """Check point 1 of the module's docstring for every merge."""
    ranks = {token: rank for rank, token in enumerate(spec.tokens)}
    for rank, (left, right) in enumerate(spec.merges, start=256):
        parts = [bytes([byte]) for byte in left + right]
        while len(parts) > 2:
            lowest, place = min(
                (ranks.get(first + second, sys.maxsize), place) for place, (first, second) in enumerate(pairwise(parts))
            )
            if lowest >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if parts != [left, right]:
            raise NotProvenError(f"merge {left!r} + {right!r} comes about in another way by ranks alone")


def _code_points() -> Iterator[str]:
    """Every code point beyond ASCII that may be assigned now or in a neighbouring version of Unicode."""
    for start, stop in ((0x80, 0xD800), (0xE000, 0xE010), (0xF8F0, 0x33480), (0xE0000, 0xE0200)):
        yield from map(chr, range(start, stop))


def _differing_characters(backend: Any, pattern: str) -> str:
    """Return the characters that the two regular expression engines class differently.

    Each character ``c`` stands before a letter, a digit, a sign, a space and a newline; are the two in one piece? To
    see tiktoken's pieces, its merges are set to join the last byte of any character with each probe.
    """
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    for last in range(0x80, 0xC0):  # what every character beyond ASCII ends in
        for probe in _PROBES.encode():
            ranks[bytes([last, probe])] = len(ranks)
    toy = tiktoken.Encoding(name="toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    different = []
    batch: list[str] = []
    for character in _code_points():
        batch.append(character)
        if len(batch) == 4096:
            different += _differing_in(backend, toy, batch)
            batch = []
    return "".join(different + _differing_in(backend, toy, batch))


def _differing_in(backend: Any, toy: Any, characters: Sequence[str]) -> list[str]:
    texts = ["".join(character + probe for probe in _PROBES) for character in characters]
    joined = "".join(texts)
    starts = np.cumsum([0] + [len(text.encode()) for text in texts])
    theirs = np.zeros(starts[-1] + 1, dtype=bool)  # byte positions at which a piece starts
    for _, (first, _last) in backend.pre_tokenizer.pre_tokenize_str(joined):
        theirs[first] = True
    theirs = _to_byte_positions(joined, theirs)
    ranks = toy.encode_to_numpy(joined, disallowed_special=())
    widths = np.where(ranks >= 256, 2, 1)
    inside = np.zeros(starts[-1] + 1, dtype=bool)  # byte positions that a merge runs over: no piece starts there
    inside[np.cumsum(widths)[ranks >= 256] - 1] = True
    found = []
    for number, character in enumerate(characters):
        width = len(character.encode()) + 1
        places = starts[number] + np.arange(len(_PROBES)) * width + width - 1
        if (theirs[places] == inside[places]).any():
            found.append(character)
    return found


def _to_byte_positions(text: str, at_characters: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Turn flags by character position into flags by position in the UTF-8 bytes."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(int) + (codes >= 0x800) + (codes >= 0x10000)
    positions = np.cumsum(widths) - widths
    result = np.zeros(int(widths.sum()) + 1, dtype=bool)
    result[positions[at_characters[: len(codes)]]] = True
    return result


def check_texts(tokenizer: Tokenizer, fast: FastBpe, texts: Sequence[str]) -> None:
    """Compare the ids of some texts; raises NotProvenError for the first that differs."""
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found = fast.encode(text)
        if found is not None and found.tolist() != expected:
            raise NotProvenError(f"different ids for {text[:80]!r}")


def _fuzz_texts() -> list[str]:
    choose = random.Random(20)
    return ["".join(choose.choices(_FUZZ_ALPHABET, k=choose.randint(1, 40))) for _ in range(4000)]


def _shipped_texts() -> list[str]:
    return [
        document.text
        for name in asset_names("text")
        for document in read_documents(resolve_path(f"asset:{name}", "text"), "text")
    ]
