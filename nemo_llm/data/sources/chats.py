"""Conversations as tokens with a mask of those that are learned, written once into the cache and mapped from there.

Files of a cache entry: ``tokens.bin`` (int32), ``learned.bin`` (uint8) and ``starts.bin`` (int64, where each
conversation begins, and the total). A negative id ``-1 - i`` stands for virtual token ``i`` of prompt tuning.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_llm.assets import resolve_path
from nemo_llm.config.chat import ChatConfig
from nemo_llm.config.sections.data import DataConfig
from nemo_llm.config.sections.sources import ChatSource
from nemo_llm.corpus.documents import expand_inputs, read_records
from nemo_llm.data.chat_format import BadChatError, ChatRecord, Message, to_conversation
from nemo_llm.data.chat_template import fixed_day, load_template, saved_source
from nemo_llm.data.sources.kind import FileKind, OpenContext
from nemo_llm.data.sources.split import SourcePart, cut_documents
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.data.template_checks import content_form, control_text_problems
from nemo_llm.data.template_tokens import TemplateEncoder
from nemo_llm.errors import InputError
from nemo_llm.log import get_logger, is_first_rank
from nemo_llm.storage.build_cache import build_once, content_key, file_sha256
from nemo_llm.tokenizers.tokenizer import Tokenizer

_VERSION = 2

_EMPTY: tuple[Any, ...] = (None, "", [], {})

_log = get_logger(__name__)


@dataclass(frozen=True)
class EncodedChat:
    """One conversation: ids, and for each whether it is learned (when it is a label)."""

    tokens: list[int]
    learned: list[bool]
    unused: tuple[str, ...] = ()
    """What the record says and neither the text nor the rules of learning show, once for each place."""


class ChatEncoder:
    """Turns conversations into tokens by the rules of ``data.chat``."""

    def __init__(
        self, config: ChatConfig, capacity: int, tokenizer: Tokenizer, tokenizer_path: str | None, virtual_tokens: int
    ) -> None:
        """``capacity`` is the most tokens that a conversation may have; the template may lie at ``tokenizer_path``."""
        self.config, self.capacity = config, capacity
        self.tokens = TemplateEncoder(tokenizer)
        folder = None if tokenizer_path is None else resolve_path(tokenizer_path, "tokenizers")
        folder = folder.parent if folder is not None and folder.is_file() else folder
        today = fixed_day(config.date)
        self.template = load_template(config.template, self.tokens, folder, "data.chat.template", today)
        self.content_form = content_form(self.template)
        self.virtual = [-1 - number for number in range(virtual_tokens)]

    def encode(self, chat: ChatRecord) -> EncodedChat:
        """Ids of a whole conversation.

        Raises:
            BadChatError: a template that writes a conversation otherwise once it goes on, so that what belongs to an
                answer cannot be told; an answer of which it writes nothing.
            InputError: the template refuses the conversation.
        """
        shown = dataclasses.replace(chat, messages=[self.content_form.fit(message) for message in chat.messages])
        text = self._render(shown)
        marked: list[tuple[int, int]] = []
        if self.template.marks_answers:
            same, marked = self.template.render_with_answers(_plain(shown.messages), chat.tools, chat.documents)
            marked = marked if same == text else []  # a template may look at what it has written, and so at the marks
        spans = list(self._learned_spans(shown, text, marked))
        placed = self.tokens.encode_placed(text, [edge for span in spans for edge in span])
        # A token that begins in the question (with its last space, say) and ends in the answer is learned.
        learned = [any(start < high and low < end for low, high in spans) for _, start, end in placed]
        unused = (*(f"{name} of records" for name in chat.unused), *self._unused(shown, text))
        ids = [*self.virtual, *(token for token, _, _ in placed)]
        return EncodedChat(ids, [False] * len(self.virtual) + learned, unused)

    def _render(self, chat: ChatRecord, count: int | None = None, add_generation_prompt: bool = False) -> str:
        """Text of the first ``count`` messages; None for all."""
        return self.template.render(
            _plain(chat.messages[:count]),
            tools=chat.tools,
            documents=chat.documents,
            add_generation_prompt=add_generation_prompt,
        )

    def _learned_spans(self, chat: ChatRecord, text: str, marked: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Stretches of the text that are learned, of which the template ``marked`` the answers or none."""
        if self.config.train_on == "all":
            yield 0, len(text)
            return
        answers = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if marked and len(marked) != len(answers):
            raise BadChatError(
                f"the chat template marks {len(marked)} answers with {{% generation %}} and the conversation has "
                f"{len(answers)}; use data.chat.train_on=all or another data.chat.template"
            )
        for number, place in enumerate(answers):
            by_rule = self.config.train_on == "answers" or place == answers[-1]
            if chat.messages[place].get("train", by_rule):
                yield marked[number] if marked else self._span(chat, text, place)

    def _span(self, chat: ChatRecord, text: str, place: int) -> tuple[int, int]:
        """Where an answer stands: behind what the template writes before it, up to what it writes with it."""
        before = self._render(chat, place, add_generation_prompt=True)
        through = self._render(chat, place + 1)
        if not (text.startswith(through) and through.startswith(before)):
            raise BadChatError(
                f"the chat template does not round-trip: the text up to answer {place} is no prefix of the whole, "
                "so its tokens cannot be told from the question's; use data.chat.train_on=last_answer or all, one turn "
                "a record, or another data.chat.template"
            )
        return len(before), len(through)

    def _unused(self, chat: ChatRecord, text: str) -> Iterator[str]:
        """What could be taken out of a conversation and its text would be the same.

        Raises:
            BadChatError: of an answer that would be learned as an empty one.
        """
        if chat.tools is not None and self._is_same(dataclasses.replace(chat, tools=None), text):
            yield "tools of records"
        if chat.documents is not None and self._is_same(dataclasses.replace(chat, documents=None), text):
            yield "documents of records"
        missing: dict[int, list[str]] = {place: [] for place in range(len(chat.messages))}
        for name in dict.fromkeys(key for message in chat.messages for key in message if key not in ("role", "train")):
            for place in self._unused_places(chat, text, name):
                missing[place].append(name)
        for place, names in missing.items():
            message = chat.messages[place]
            having = [key for key, value in message.items() if key not in ("role", "train") and value not in _EMPTY]
            if message["role"] == "assistant" and names and set(having) <= set(names):
                raise BadChatError(
                    f"message {place}: the chat template writes nothing of the answer's {' and '.join(names)}, so that "
                    "an empty answer would be learned; use another data.chat.template"
                )
            yield from (f"{name} of {message['role']} messages" for name in names)
        for message in chat.messages:
            if "train" in message and (message["role"] != "assistant" or self.config.train_on == "all"):
                yield f"train or weight of {message['role']} messages"

    def _unused_places(self, chat: ChatRecord, text: str, name: str) -> Iterator[int]:
        """Numbers of the messages whose field ``name`` changes nothing of the text."""
        having = [place for place, message in enumerate(chat.messages) if message.get(name) not in _EMPTY]
        for role in dict.fromkeys(chat.messages[place]["role"] for place in having):
            places = [place for place in having if chat.messages[place]["role"] == role]
            # Every template writes what users and assistants say.
            is_sure = name == "content" and role in ("user", "assistant")
            if not is_sure and self._is_same(_without(chat, places, name), text):
                yield from places
                continue
            for place in places:  # what stands in the text was used; of the rest it is tried
                value = chat.messages[place][name]
                if isinstance(value, str) and value.strip() not in text:
                    yield from [place] if self._is_same(_without(chat, [place], name), text) else []

    def _is_same(self, chat: ChatRecord, text: str) -> bool:
        try:
            return self._render(chat) == text
        except InputError:
            return False

    def encode_record(self, record: Mapping[str, Any], where: str) -> EncodedChat:
        """One record's conversation.

        Raises:
            InputError: it is none, or cannot be written or learned; the message begins with ``where``.
        """
        try:
            return self.encode(to_conversation(record, self.config))
        except (BadChatError, InputError) as error:
            raise InputError(f"{where}: {error}") from error

    def encode_files(self, files: Iterable[Path], counts: Counter[str], unused: Counter[str]) -> Iterator[EncodedChat]:
        """Conversations of these files, those that are too long treated as the configuration says.

        ``counts`` says what became of them, ``unused`` what of them is not used.

        Raises:
            InputError: naming file and line of what cannot be read, or of the first that is too long where none may be.
        """
        for file in files:
            for number, record in read_records(file):
                chat = self.encode_record(record, f"{file}:{number}")
                counts["conversations"] += 1
                unused.update(chat.unused)
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


def _plain(messages: Iterable[Message]) -> list[Message]:
    """Messages as the template is given them."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _without(chat: ChatRecord, places: list[int], name: str) -> ChatRecord:
    """A conversation in which some messages lack a field, or have an empty content."""
    messages = list(chat.messages)
    for place in places:
        rest = {key: value for key, value in messages[place].items() if key != name}
        messages[place] = rest | ({"content": ""} if name == "content" else {})
    return dataclasses.replace(chat, messages=messages)


class ChatStore(TokenStore):
    """Conversations of a cache entry, as documents of tokens."""

    has_learned = True

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


class ChatKind(FileKind[ChatSource]):
    """Conversations, each a document with a mask of what is learned."""

    def open(self, context: OpenContext) -> ChatStore:
        """See `open_chats`."""
        return open_chats(self.entry.path, context.config, context.tokenizer, context.cache, context.virtual_tokens)

    def split(self, store: TokenStore, part: SourcePart, _tokens_per_sample: int) -> tuple[TokenStore, tuple[int, int]]:
        """Between conversations, in file order."""
        return cut_documents(self.entry.name, store, part, "conversations")


def open_chats(pattern: str, config: DataConfig, tokenizer: Tokenizer, cache: Path, virtual_tokens: int) -> ChatStore:
    """The conversations of a file, folder or glob, encoded into the cache the first time.

    Raises:
        InputError: missing files; the first record that is no conversation, with file and line; nothing left to learn.
    """
    files = expand_inputs(pattern)
    path = config.tokenizer.path
    encoder = ChatEncoder(config.chat, config.seq_length + 1, tokenizer, path, virtual_tokens)
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
        chats = encoder.encode_files(files, counts, unused)
        if not write_documents(folder, ((chat.tokens, chat.learned) for chat in chats)):
            raise InputError(f"{pattern}: no conversation is left to learn from: {in_words(counts, 'conversations')}")
        return {"counts": dict(counts), "unused": dict(unused)}

    folder = cache / f"chat-{key}"
    build_counted(folder, build, pattern, "conversations")
    store = ChatStore(folder)
    store.chat_template = saved_source(encoder.template, encoder.tokens)
    return store


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
    file: Path, config: ChatConfig, tokenizer: Tokenizer, numbers: set[int]
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(number, text, what is not used) of some records, counted from 0.

    What is learned stands in green (an ANSI terminal's colours).

    Raises:
        InputError: a record that is no conversation, with file and line.
    """
    encoder = ChatEncoder(config, sys.maxsize, tokenizer, tokenizer.config.path, 0)
    for problem in control_text_problems(encoder.template, encoder.tokens):
        _warn_once(problem)
    for place, (line, record) in enumerate(read_records(file)):
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
