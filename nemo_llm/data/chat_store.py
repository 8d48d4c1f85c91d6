"""Conversations as tokens with a mask of those that are learned, written once into the cache and mapped from there.

Files of a cache entry: ``tokens.bin`` (int32), ``learned.bin`` (uint8) and ``starts.bin`` (int64, where each
conversation begins, and the total). A negative id ``-1 - i`` stands for virtual token ``i`` of prompt tuning.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_llm.assets import resolve_path
from nemo_llm.config.chat import ChatConfig
from nemo_llm.config.data import DataConfig
from nemo_llm.data.cache import build_once, content_key, file_sha256
from nemo_llm.data.chat_format import BadChatError, Message, read_records, to_messages
from nemo_llm.data.chat_template import ChatTemplate, load_template
from nemo_llm.data.documents import expand_inputs
from nemo_llm.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from nemo_llm.errors import InputError
from nemo_llm.log import get_logger

_VERSION = 1

_log = get_logger(__name__)


@dataclass(frozen=True)
class EncodedChat:
    """One conversation: ids, and for each whether it is learned (when it is a label)."""

    tokens: list[int]
    learned: list[bool]


class ChatEncoder:
    """Turns conversations into tokens by the rules of ``data.chat``."""

    def __init__(
        self, config: ChatConfig, capacity: int, tokenizer: Tokenizer, tokenizer_path: str | None, virtual_tokens: int
    ) -> None:
        """``capacity`` is the most tokens that a conversation may have; the template may lie at ``tokenizer_path``."""
        self.config, self.capacity = config, capacity
        place = None if tokenizer_path is None else str(resolve_path(tokenizer_path, "tokenizers"))
        self.template: ChatTemplate = load_template(config.template, tokenizer, place)
        self.virtual = [-1 - number for number in range(virtual_tokens)]
        self.tokenizer = tokenizer
        self._backend: Any = None
        if isinstance(tokenizer, HuggingFaceTokenizer):
            from tokenizers import Tokenizer as Backend

            # A copy of its own that reads special tokens by name: a template writes them as text.
            self._backend = Backend.from_str(tokenizer.backend.to_str())
            self._backend.encode_special_tokens = False

    def encode(self, messages: list[Message]) -> EncodedChat:
        """Ids of a whole conversation.

        Raises:
            BadChatError: a template that writes a conversation otherwise once it goes on, so that what belongs to an
                answer cannot be told.
        """
        text = self.template.render(messages)
        spans = list(self._learned_spans(messages, text))
        if self._backend is not None:
            encoding = self._backend.encode(text, add_special_tokens=False)
            tokens = encoding.ids
            # A token that begins in the question (with its last space, say) and ends in the answer is learned.
            learned = [any(start < high and low < end for low, high in spans) for start, end in encoding.offsets]
        else:
            tokens, learned = self._encode_pieces(text, spans)
        return EncodedChat([*self.virtual, *tokens], [False] * len(self.virtual) + learned)

    def _learned_spans(self, messages: list[Message], text: str) -> Iterator[tuple[int, int]]:
        if self.config.train_on == "all":
            yield 0, len(text)
            return
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for place in answers:
            by_rule = self.config.train_on == "answers" or place == answers[-1]
            if not messages[place].get("train", by_rule):
                continue
            before = self.template.render(messages[:place], add_generation_prompt=True)
            through = self.template.render(messages[: place + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise BadChatError(
                    f"the chat template does not round-trip: the text up to answer {place} is no prefix of the whole, "
                    "so its tokens cannot be told from the question's; use data.chat.train_on=all, one turn a record, "
                    "or another data.chat.template"
                )
            yield len(before), len(through)

    def _encode_pieces(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """For tokenizers that do not say where a token stood: each stretch by itself."""
        tokens: list[int] = []
        learned: list[bool] = []
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        for low, high in pairwise(edges):
            ids = self.tokenizer.encode(text[low:high])
            tokens += ids
            learned += [any(a <= low < b for a, b in spans)] * len(ids)
        return tokens, learned

    def encode_files(self, files: Iterable[Path], counts: Counter[str]) -> Iterator[EncodedChat]:
        """Conversations of these files, those that are too long treated as the configuration says; ``counts`` them.

        Raises:
            InputError: naming file and line of what cannot be read, or of the first that is too long where none may be.
        """
        for file in files:
            for number, record in read_records(file):
                try:
                    chat = self.encode(to_messages(record, self.config))
                except (BadChatError, InputError) as error:
                    raise InputError(f"{file}:{number}: {error}") from error
                counts["conversations"] += 1
                if len(chat.tokens) > self.capacity:
                    cut = self._shorten(chat, f"{file}:{number}", counts)
                    if cut is None:
                        continue
                    chat = cut
                if not any(chat.learned):
                    counts["without learned tokens"] += 1
                    continue
                yield chat

    def _shorten(self, chat: EncodedChat, where: str, counts: Counter[str]) -> EncodedChat | None:
        if self.config.too_long == "error":
            raise InputError(
                f"{where}: {len(chat.tokens)} tokens, and a sample holds data.seq_length + 1 = {self.capacity}; raise "
                "data.seq_length, or set data.chat.too_long=drop or truncate"
            )
        if self.config.too_long == "drop":
            counts["dropped as too long"] += 1
            return None
        counts["truncated"] += 1
        return EncodedChat(chat.tokens[: self.capacity], chat.learned[: self.capacity])


class ChatStore:
    """Conversations of a cache entry, as documents of tokens."""

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
    path = config.tokenizer.path
    encoder = ChatEncoder(config.chat, config.seq_length + 1, tokenizer, path, virtual_tokens)
    key = content_key(
        kind="chat",
        version=_VERSION,
        files=[file_sha256(file) for file in files],
        chat=dataclasses.asdict(config.chat),
        template=encoder.template.source,
        seq_length=config.seq_length,
        tokenizer=tokenizer.fingerprint,
        virtual_tokens=virtual_tokens,
    )

    def build(folder: Path) -> dict:
        counts: Counter[str] = Counter()
        if not write_documents(folder, ((c.tokens, c.learned) for c in encoder.encode_files(files, counts))):
            raise InputError(f"{pattern}: no conversation is left to learn from ({dict(counts)})")
        return {"counts": dict(counts)}

    folder = cache / f"chat-{key}"
    build_counted(folder, build, pattern, "conversations")
    return ChatStore(folder)


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
    """`build_once`, and a warning of what was cut or left out: ``counts`` other than that of all ``documents``."""
    counts = build_once(folder, build)["counts"]
    lost = {name: count for name, count in counts.items() if name != documents}
    if lost:
        _log.warning("%s: of %d %s: %s", pattern, counts[documents], documents, lost)


def show_chats(file: Path, config: ChatConfig, tokenizer: Tokenizer, numbers: set[int]) -> Iterator[tuple[int, str]]:
    """(number, text) of some records, counted from 0; what is learned stands in green (an ANSI terminal's colours).

    Raises:
        InputError: a record that is no conversation, with file and line.
    """
    encoder = ChatEncoder(config, sys.maxsize, tokenizer, tokenizer.config.path, 0)
    for place, (line, record) in enumerate(read_records(file)):
        if place > max(numbers):
            return
        if place not in numbers:
            continue
        try:
            chat = encoder.encode(to_messages(record, config))
        except (BadChatError, InputError) as error:
            raise InputError(f"{file}:{line}: {error}") from error
        parts = []
        for learned, run in groupby(zip(chat.learned, chat.tokens, strict=True), key=lambda pair: pair[0]):
            text = tokenizer.decode([token for _, token in run])
            parts.append(f"\033[32m{text}\033[0m" if learned else text)
        yield place, "".join(parts)
