"""What a chat template makes of small conversations: the form of content it reads, and how it ends an answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_llm.conversation.messages import Message
from nemo_llm.conversation.template import ChatTemplate
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.errors import InputError

_QUESTION, _ANSWER = "Qvestion", "Ansver"  # words that no template writes of itself
_CONTROL_NAME = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True)
class ContentForm:
    """In which form a template reads a message's content."""

    as_text: bool
    as_parts: bool

    def fit(self, message: Message) -> Message:
        """A message with its content in a form that the template reads: text, or a list with one part of text."""
        content: Any = message.get("content")
        if isinstance(content, list) and not self.as_parts:
            return {**message, "content": "".join(part["text"] for part in content)}
        if isinstance(content, str) and not self.as_text and self.as_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message


def content_form(template: ChatTemplate) -> ContentForm:
    """Find out by a question in each form. A template that reads neither is given what the record has."""

    def reads(content: Any, wrong: str) -> bool:
        for messages in ([_message("user", content)], [_message("user", content), _message("assistant", content)]):
            try:
                text = template.render(messages)
            except InputError:
                continue
            return _QUESTION in text and wrong not in text
        return False

    # A template for text alone writes a list as Python does, with the names of its fields.
    return ContentForm(reads(_QUESTION, "\0"), reads([{"type": "text", "text": _QUESTION}], "'type'"))


def answer_end(template: ChatTemplate) -> str | None:
    """What the template writes behind the last answer; None where no small conversation suits it."""
    text = _sample(template)
    return None if text is None else text.rpartition(_ANSWER)[2]


def control_text_problems(template: ChatTemplate, encoder: TemplateEncoder) -> Iterator[str]:
    """What keeps a model from learning, by tokens of their own, where answers end and whose turn it is."""
    text = _sample(template)
    if text is None:
        return
    end = text.rpartition(_ANSWER)[2]
    if not end.strip():
        yield (
            f"the chat template {template.origin} writes nothing behind an answer: the model does not learn where an "
            "answer ends, and generation ends at sampling.max_new_tokens or sampling.stop"
        )
    in_end = _CONTROL_NAME.findall(end) or ([end.strip()] if len(end.split()) == 1 else [])
    tokenizer = encoder.tokenizer.config.name
    for name in dict.fromkeys([*_CONTROL_NAME.findall(text), *in_end]):
        if (count := len(encoder.encode(name))) > 1:
            ends = f"; it ends an answer, and generation ends there with sampling.stop=['{name}']"
            yield (
                f"the chat template {template.origin} writes {name}, which is no token of the tokenizer {tokenizer}: "
                f"it becomes {count} ordinary tokens{ends if name in in_end else ''}"
            )


def _sample(template: ChatTemplate) -> str | None:
    form = content_form(template)
    turn = [_message("user", _QUESTION), _message("assistant", _ANSWER)]
    for messages in ([_message("system", _QUESTION), *turn, *turn], [*turn, *turn], turn):
        try:
            text = template.render([form.fit(message) for message in messages])
        except InputError:
            continue
        if _ANSWER in text:
            return text
    return None


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}
