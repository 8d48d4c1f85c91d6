"""Which tokens of a conversation are learned: answers, where the template says or its text shows that they stand."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_llm.config.sections.chat import ChatConfig
from nemo_llm.conversation.messages import BadChatError, ChatRecord, Message, to_conversation
from nemo_llm.conversation.template import fixed_day, load_template
from nemo_llm.conversation.template_checks import content_form
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer

_EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class EncodedChat:
    """One conversation: ids, and for each whether it is learned (when it is a label)."""

    tokens: list[int]
    learned: list[bool]
    unused: tuple[str, ...] = ()
    """What the record says and neither the text nor the rules of learning show, once for each place."""


class ChatEncoder:
    """Turns conversations into tokens by the rules of ``data.chat``."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, virtual_tokens: int = 0) -> None:
        self.config = config
        self.tokens = TemplateEncoder(tokenizer)
        self.template = load_template(config.template, self.tokens, "data.chat.template", fixed_day(config.date))
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
        answers = [place for place, message in enumerate(shown.messages) if message["role"] == "assistant"]
        marked = None if self.config.train_on == "all" else self._marked(shown, text)
        spans = list(self._learned_spans(shown, text, answers, marked))
        placed = self.tokens.encode_placed(text, [edge for span in spans for edge in span])
        # A token that begins in the question (with its last space, say) and ends in the answer is learned.
        learned = [any(start < high and low < end for low, high in spans) for _, start, end in placed]
        unused = [f"{name} of records" for name in chat.unused] + list(self._unused(shown, text))
        if marked is not None:
            unused += ["answers outside {% generation %}"] * (len(answers) - len(marked))
        ids = [*self.virtual, *(token for token, _, _ in placed)]
        return EncodedChat(ids, [False] * len(self.virtual) + learned, tuple(unused))

    def _render(self, chat: ChatRecord, count: int | None = None, add_generation_prompt: bool = False) -> str:
        """Text of the first ``count`` messages; None for all."""
        return self.template.render(
            _plain(chat.messages[:count]),
            tools=chat.tools,
            documents=chat.documents,
            add_generation_prompt=add_generation_prompt,
        )

    def _marked(self, chat: ChatRecord, text: str) -> list[tuple[int, int]] | None:
        """Stretches that the template marks as answers; None where it does not, or looks at the marks itself."""
        if not self.template.marks_answers:
            return None
        same, marked = self.template.render_with_answers(_plain(chat.messages), chat.tools, chat.documents)
        return marked if same == text else None

    def _learned_spans(
        self, chat: ChatRecord, text: str, answers: list[int], marked: list[tuple[int, int]] | None
    ) -> Iterator[tuple[int, int]]:
        """Stretches of the text that are learned: all that is ``marked``, as in transformers, or some answers."""
        if self.config.train_on == "all":
            yield 0, len(text)
            return
        by_rule = answers if self.config.train_on == "answers" else answers[-1:]
        chosen = [place for place in answers if chat.messages[place].get("train", place in by_rule)]
        if marked is not None and (chosen == answers or len(marked) == len(answers)):
            yield from marked if chosen == answers else (marked[answers.index(place)] for place in chosen)
            return
        for place in chosen:
            low, high = self._span(chat, text, place)
            yield from [(low, high)] if marked is None else (mark for mark in marked if low < mark[1] <= high)

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
