"""Conversations from records: OpenAI's messages, ShareGPT, Alpaca, prompt and completion, or two named fields.

A conversation is a list of messages with ``role`` and ``content``. All other fields of a message go to the template as
they are, but ``train`` (true or false) and ``weight`` (1 or 0), which say whether an answer is learned. A field
without a value (null) counts as absent.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_llm.config.sections.chat import ChatConfig

# Which roles may follow each.
_FOLLOWERS = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in _FOLLOWERS}}

Message = dict[str, Any]


class BadChatError(ValueError):
    """What is wrong with one record, in words."""


@dataclass(frozen=True)
class ChatRecord:
    """What one record says."""

    messages: list[Message]
    """Each with ``role`` and ``content``, whatever else the template may use, and perhaps ``train`` (true or false)."""
    tools: list[dict[str, Any]] | None = None
    """Descriptions of functions, for the template."""
    documents: list[dict[str, Any]] | None = None
    """Texts that answers may refer to, for the template."""
    unused: tuple[str, ...] = ()
    """Fields of the record that are no part of the conversation."""


def to_conversation(record: Mapping[str, Any], config: ChatConfig) -> ChatRecord:
    """The conversation of one record, checked.

    Raises:
        BadChatError: fields that are missing or of another kind, or roles out of order.
    """
    record = {key: value for key, value in record.items() if value is not None}
    messages, used = _convert(record, config)
    tools = documents = None
    if config.prompt_key is None:
        tools, documents = _mappings(record, "tools"), _mappings(record, "documents")
        used |= {"tools", "documents"}
        if "system" in record and messages and messages[0]["role"] != "system":
            system = _text(record, "system")
            messages = [{"role": "system", "content": system}, *messages] if system else messages
            used.add("system")
    if config.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    check_order(messages)
    return ChatRecord(messages, tools, documents, tuple(key for key in record if key not in used))


def _convert(record: Mapping[str, Any], config: ChatConfig) -> tuple[list[Message], set[str]]:
    """(messages, fields of the record that they were made of)."""
    if config.prompt_key is not None and config.answer_key is not None:
        keys = (config.prompt_key, config.answer_key)
        return _turn(_text(record, keys[0]), _text(record, keys[1])), set(keys)
    if "messages" in record:
        return [_message(message, "role", "content") for message in _list(record, "messages")], {"messages"}
    if "conversations" in record:
        return _sharegpt(_list(record, "conversations")), {"conversations"}
    if "instruction" in record:
        question = _text(record, "instruction")
        more = _text(record, "input") if "input" in record else ""
        messages = _turn(f"{question}\n\n{more}" if more else question, _text(record, "output"))
        return messages, {"instruction", "input", "output"}
    if "prompt" in record:
        used = {"prompt", "completion"}
        if isinstance(record["prompt"], list):
            whole = [*_list(record, "prompt"), *_list(record, "completion")]
            return [_message(message, "role", "content") for message in whole], used
        return _turn(_text(record, "prompt"), _text(record, "completion")), used
    raise BadChatError(
        "no field that tells its form: messages, conversations (ShareGPT), instruction (Alpaca) or prompt; the record "
        f"has {', '.join(sorted(record)[:10]) or 'none'}. Name two fields with data.chat.prompt_key and "
        "data.chat.answer_key"
    )


def _sharegpt(turns: list[Any]) -> list[Message]:
    named = "from" if isinstance(turns[0], Mapping) and "from" in turns[0] else "role"
    messages = [_message(turn, named, "value" if named == "from" else "content") for turn in turns]
    for message in messages:
        if message["role"] not in _SHAREGPT_ROLES:
            raise BadChatError(f"unknown speaker {message['role']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
        message["role"] = _SHAREGPT_ROLES[message["role"]]
    return messages


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise BadChatError(f"no field {key!r}, the record has {', '.join(sorted(record)[:10])}")
    if not isinstance(record[key], str):
        raise BadChatError(f"field {key!r} holds {type(record[key]).__name__}, not text")
    return record[key]


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise BadChatError(f"field {key!r} must be a list of messages, received {value!r:.60}")
    return value


def _mappings(record: Mapping[str, Any], key: str) -> list[dict[str, Any]] | None:
    """A field that holds a list of mappings, or the same as JSON text; None where it is absent or empty."""
    value = record.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except (ValueError, RecursionError) as error:
            raise BadChatError(f"field {key!r} is text that is no JSON ({error})") from None
    if not value and value in (None, [], ()):
        return None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise BadChatError(f"field {key!r} must be a list of mappings, received {value!r:.60}")
    return [dict(item) for item in value]


def _message(item: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get(role_key), str):
        raise BadChatError(f"a message has {role_key!r} and {content_key!r}, received {item!r:.80}")
    fields = {key: value for key, value in item.items() if value is not None}
    role, content = fields.pop(role_key), fields.pop(content_key, None)
    if twice := {"role", "content"} & fields.keys():
        raise BadChatError(f"a message with {role_key!r} and {content_key!r} has {', '.join(sorted(twice))} besides")
    calls = fields.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise BadChatError(f"'tool_calls' of a {role} message must be a list of mappings, received {calls!r:.80}")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        for part in content:
            _check_part(part, role)
    elif not isinstance(content, str):
        raise BadChatError(f"{content_key!r} of a {role} message must be text, received {item!r:.80}")
    message: Message = {**fields, "role": role, "content": content}
    train = _is_learned(message)
    if train is not None:
        message["train"] = train
    return message


def _check_part(part: Any, role: str) -> None:
    """Refuse a part of a message's content that is not of the form ``{"type": "text", "text": ...}``."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadChatError(
            f"the content of a {role} message has a part of type {kind!r}; only text parts can be learned from: "
            '{"type": "text", "text": "..."}'
        )


def _is_learned(message: Message) -> bool | None:
    """Take ``train`` and ``weight`` out of a message; None where it has neither."""
    found = {}
    if "train" in message:
        found["train"] = message.pop("train")
        if not isinstance(found["train"], bool):
            raise BadChatError(f"'train' of a message must be true or false, received {found['train']!r}")
    if "weight" in message:
        weight = message.pop("weight")
        if isinstance(weight, bool) or weight not in (0, 1):
            raise BadChatError(
                f"'weight' of a message must be 1 (learned) or 0 (not learned), received {weight!r}: shares between "
                "them are not supported"
            )
        found["weight"] = bool(weight)
    if len(set(found.values())) > 1:
        raise BadChatError("'train' and 'weight' of a message contradict each other")
    return next(iter(found.values()), None)


def check_order(messages: list[Message]) -> None:
    """A system message at most at the start; then user and assistant in turn, ending with an answer.

    Raises:
        BadChatError: otherwise.
    """
    expected: tuple[str, ...] = ("system", "user")
    for place, message in enumerate(messages):
        role = message["role"]
        if role not in _FOLLOWERS:
            raise BadChatError(f"message {place}: unknown role {role!r}; known are {', '.join(_FOLLOWERS)}")
        if role not in expected:
            raise BadChatError(f"message {place}: role {role!r} where {' or '.join(expected)} belongs")
        expected = _FOLLOWERS[role]
    if not messages or messages[-1]["role"] != "assistant":
        raise BadChatError("the last message must be the assistant's: nothing after the last question can be learned")
