"""Conversations as tokens with a mask of those that are learned, written once into the cache and mapped from there.

Files of a cache entry: ``tokens.bin`` (int32), ``learned.bin`` (uint8) and ``starts.bin`` (int64, where each
conversation begins, and the total). A negative id ``-1 - i`` stands for virtual token ``i`` of prompt tuning.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_llm.config.sections.chat import ChatConfig
from nemo_llm.config.sections.data import DataConfig
from nemo_llm.conversation.masks import ChatEncoder, EncodedChat
from nemo_llm.conversation.template import saved_source
from nemo_llm.conversation.template_checks import control_text_problems
from nemo_llm.corpus.documents import expand_inputs
from nemo_llm.corpus.records import read_all_records
from nemo_llm.errors import InputError
from nemo_llm.log import get_logger, is_first_rank
from nemo_llm.storage.build_cache import build_once, content_key, file_sha256
from nemo_llm.tokenizers.tokenizer import Tokenizer

_VERSION = 3

_log = get_logger(__name__)


class ChatStore:
    """Conversations of a cache entry, as documents of tokens."""

    chat_template: str | None = None
    """The template that conversations were written with, as a checkpoint keeps it."""

    def __init__(self, folder: Path) -> None:
        self.prefix = str(folder)
        self._tokens = np.memmap(folder / "tokens.bin", dtype="<i4", mode="r")
        self._learned = np.memmap(folder / "learned.bin", dtype="u1", mode="r")
        self._starts = np.fromfile(folder / "starts.bin", dtype="<i8")
        self.num_documents = len(self._starts) - 1
        self.num_tokens = int(self._starts[-1])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` as int64 [count]."""
        return self._tokens[start : start + count].astype(np.int64)

    def read_learned(self, start: int, count: int) -> NDArray[np.float32]:
        """Return 1 for each of ``count`` tokens that is learned, as float32 [count]."""
        return self._learned[start : start + count].astype(np.float32)

    def document_start(self, document: int) -> int:
        """Return the position of a conversation's first token; for ``num_documents``, the number of tokens."""
        return int(self._starts[document])

    def document_at(self, token: int) -> int:
        """Return the conversation that holds the token at a position."""
        return int(np.searchsorted(self._starts, token, side="right")) - 1


def open_chats(pattern: str, config: DataConfig, tokenizer: Tokenizer, cache: Path, virtual_tokens: int) -> ChatStore:
    """The conversations of a file, folder or glob, encoded into the cache the first time.

    Raises:
        InputError: missing files; the first record that is no conversation, with file and line; nothing left to learn.
    """
    files = expand_inputs(pattern)
    encoder = ChatEncoder(config.chat, tokenizer, virtual_tokens)
    for problem in control_text_problems(encoder.template, encoder.tokens):
        _warn_once(problem)
    key = content_key(
        kind="chat",
        version=_VERSION,
        files=[file_sha256(file) for file in files],
        chat=dataclasses.asdict(config.chat),
        template=encoder.template.source,
        variables=encoder.template.variables,
        seq_length=config.seq_length,
        tokenizer=tokenizer.fingerprint,
        virtual_tokens=virtual_tokens,
    )

    def build(folder: Path) -> dict:
        counts: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        chats = encode_files(encoder, config.seq_length + 1, files, counts, unused)
        if not write_documents(folder, ((chat.tokens, chat.learned) for chat in chats)):
            raise InputError(f"{pattern}: no conversation is left to learn from: {in_words(counts, 'conversations')}")
        return {"counts": dict(counts), "unused": dict(unused)}

    folder = cache / f"chat-{key}"
    build_counted(folder, build, pattern, "conversations")
    store = ChatStore(folder)
    store.chat_template = saved_source(encoder.template, encoder.tokens)
    return store


def encode_files(
    encoder: ChatEncoder, capacity: int, files: Iterable[Path], counts: Counter[str], unused: Counter[str]
) -> Iterator[EncodedChat]:
    """Conversations of these files, those of more than ``capacity`` tokens treated as the configuration says.

    ``counts`` says what became of them, ``unused`` what of them is not used.

    Raises:
        InputError: naming file and line of what cannot be read, or of the first that is too long where none may be.
    """
    for file, number, record in read_all_records(files):
        chat = encoder.encode_record(record, f"{file}:{number}")
        counts["conversations"] += 1
        unused.update(chat.unused)
        if len(chat.tokens) > capacity:
            if encoder.config.too_long == "error":
                raise InputError(
                    f"{file}:{number}: {len(chat.tokens)} tokens, and a sample holds data.seq_length + 1 = {capacity}; "
                    "raise data.seq_length, or set data.chat.too_long=drop or truncate"
                )
            counts["dropped as too long" if encoder.config.too_long == "drop" else "truncated"] += 1
            if encoder.config.too_long == "drop":
                continue
            chat = EncodedChat(chat.tokens[:capacity], chat.learned[:capacity])
        if any(chat.learned):
            yield chat
        else:
            counts["without learned tokens"] += 1


def write_documents(folder: Path, documents: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Write the files of a `ChatStore` from each document's tokens and which are learned (0 or 1); returns how many."""
    starts = [0]
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "learned.bin").open("wb") as learned:
        for ids, mask in documents:
            tokens.write(np.asarray(ids, dtype="<i4").tobytes())
            learned.write(np.asarray(mask, dtype="u1").tobytes())
            starts.append(starts[-1] + len(ids))
    np.asarray(starts, dtype="<i8").tofile(folder / "starts.bin")
    return len(starts) - 1


def build_counted(folder: Path, build: Callable[[Path], dict], pattern: str, documents: str) -> None:
    """`build_once`, and a warning of what was cut, left out (``counts``) or not used."""
    manifest = build_once(folder, build)
    counts, unused = Counter(manifest["counts"]), manifest.get("unused", {})
    if set(counts) - {documents}:
        _warn_once(f"{pattern}: {in_words(counts, documents)}")
    if unused:
        _warn_once(f"{pattern}: not used: {list_unused(unused)}")


def _warn_once(text: str) -> None:
    """On the first rank alone: every rank opens the same data."""
    if is_first_rank():
        _log.warning("%s", text)


_KEYS_OF_COUNTS = {
    "dropped as too long": "data.{}.too_long=drop",
    "truncated": "data.{}.too_long=truncate",
    "without learned tokens": "no answer is to be learned, or it was cut off",
}


def in_words(counts: Mapping[str, int], documents: str) -> str:
    """What became of conversations or texts: ``of 120 conversations: 30 dropped as too long (...)``."""
    section = "chat" if documents == "conversations" else "labelled"
    parts = [
        f"{count:,} {name} ({_KEYS_OF_COUNTS[name].format(section)})"
        if name in _KEYS_OF_COUNTS
        else f"{count:,} {name}"
        for name, count in counts.items()
        if name != documents
    ]
    return f"of {counts.get(documents, 0):,} {documents}: {', '.join(parts) or 'none'}"


def list_unused(unused: Mapping[str, int]) -> str:
    """Names and numbers of what is not used, the most frequent first."""
    ranked = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ({count:,})" for name, count in ranked)


def show_chats(
    pattern: str, config: ChatConfig, tokenizer: Tokenizer, numbers: set[int]
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(number, text, what is not used) of some records, counted from 0.

    What is learned stands in green (an ANSI terminal's colours).

    Raises:
        InputError: a record that is no conversation, with file and line.
    """
    encoder = ChatEncoder(config, tokenizer)
    for problem in control_text_problems(encoder.template, encoder.tokens):
        _warn_once(problem)
    for place, (file, line, record) in enumerate(read_all_records(expand_inputs(pattern))):
        if place > max(numbers):
            return
        if place not in numbers:
            continue
        chat = encoder.encode_record(record, f"{file}:{line}")
        parts = []
        for learned, run in groupby(zip(chat.learned, chat.tokens, strict=True), key=lambda pair: pair[0]):
            text = _shown(tokenizer, [token for _, token in run])
            parts.append(f"\033[32m{text}\033[0m" if learned else text)
        yield place, "".join(parts), chat.unused


def _shown(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Text of tokens, with a name for those that have none."""
    names = {number: name for name, number in tokenizer.control_tokens().items()}
    names.setdefault(tokenizer.eod_id, tokenizer.decode([tokenizer.eod_id]) or "<end of document>")
    runs = groupby(tokens, key=lambda token: names.get(token))
    return "".join(tokenizer.decode(list(run)) if name is None else name * len(list(run)) for name, run in runs)
