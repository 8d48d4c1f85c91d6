"""Conversations from records: OpenAI's messages, ShareGPT, Alpaca, prompt and completion, or two named fields.

A conversation is a list of messages with ``role`` and ``content``; ``train`` (true or false) may stand on an answer,
and then decides whether its tokens are learned.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_llm.config.chat import ChatConfig
from nemo_llm.data.documents import file_format, open_stream, reading
from nemo_llm.errors import InputError

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]


class BadChatError(ValueError):
    """What is wrong with one record, in words."""


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row from 1, record) of a JSON-lines or Parquet file.

    Raises:
        InputError: a line that is no JSON object, or a file that cannot be read.
    """
    with reading(path):
        if file_format(path) == "parquet":
            yield from _parquet_records(path)
            return
        with open_stream(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: malformed JSON: {error}") from error
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: a record is a JSON object, received {type(record).__name__}")
                yield number, record


def _parquet_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {key: value for key, value in record.items() if value is not None}
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


def to_messages(record: Mapping[str, Any], config: ChatConfig) -> list[Message]:
    """The conversation of one record, checked.

    Raises:
        BadChatError: fields that are missing, or roles out of order.
    """
    messages = _convert(record, config)
    if config.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    check_order(messages)
    return messages


def _convert(record: Mapping[str, Any], config: ChatConfig) -> list[Message]:
    if config.prompt_key is not None and config.answer_key is not None:
        return _turn(_text(record, config.prompt_key), _text(record, config.answer_key))
    if "messages" in record:
        return [_message(message, "role", "content") for message in _list(record, "messages")]
    if "conversations" in record:
        turns = _list(record, "conversations")
        named = "from" if turns and isinstance(turns[0], Mapping) and "from" in turns[0] else "role"
        messages = [_message(turn, named, "value" if named == "from" else "content") for turn in turns]
        for message in messages:
            if message["role"] not in _SHAREGPT_ROLES:
                raise BadChatError(f"unknown speaker {message['role']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
            message["role"] = _SHAREGPT_ROLES[message["role"]]
        return messages
    if "instruction" in record:
        question, more = _text(record, "instruction"), record.get("input") or ""
        return _turn(f"{question}\n\n{more}" if more else question, _text(record, "output"))
    if "prompt" in record:
        if isinstance(record["prompt"], list):
            whole = [*_list(record, "prompt"), *_list(record, "completion")]
            return [_message(message, "role", "content") for message in whole]
        return _turn(_text(record, "prompt"), _text(record, "completion"))
    raise BadChatError(
        "no field that tells its form: messages, conversations (ShareGPT), instruction (Alpaca) or prompt; the record "
        f"has {', '.join(sorted(record)[:10]) or 'none'}. Name two fields with data.chat.prompt_key and "
        "data.chat.answer_key"
    )


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


def _message(item: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get(role_key), str):
        raise BadChatError(f"a message has {role_key!r} and {content_key!r}, received {item!r:.80}")
    if not isinstance(item.get(content_key), str):
        raise BadChatError(f"{content_key!r} of a {item[role_key]} message must be text, received {item!r:.80}")
    message: Message = {"role": item[role_key], "content": item[content_key]}
    if "train" in item:
        message["train"] = bool(item["train"])
    return message


def check_order(messages: list[Message]) -> None:
    """A system message at most at the start; then user and assistant in turn, ending with an answer.

    Raises:
        BadChatError: otherwise.
    """
    expected: tuple[str, ...] = ("system", "user")
    for place, message in enumerate(messages):
        role = message["role"]
        if role not in _ROLES:
            raise BadChatError(f"message {place}: unknown role {role!r}; known are {', '.join(_ROLES)}")
        if role not in expected:
            raise BadChatError(f"message {place}: role {role!r} where {' or '.join(expected)} belongs")
        expected = {
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool"),
        }[role]
    if not messages or messages[-1]["role"] != "assistant":
        raise BadChatError("the last message must be the assistant's: nothing after the last question can be learned")
