"""Prompts from the command line, from files and from chat templates, as token ids."""

import json
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_llm.data.tokenizer import Tokenizer
from nemo_llm.errors import InputError

Message = dict[str, str]

CHAT_TEMPLATE_FILE_NAME = "chat_template.jinja"
_HF_SETTINGS_FILE_NAME = "tokenizer_config.json"


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the field ``text`` of JSON lines (``.jsonl``), else one a line; empty lines do not count.

    Raises:
        InputError: a file that is missing, empty or no JSON, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"text_file={path}: there is no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"text_file={path}: cannot be read ({error})") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{path}, line {number}: expected {{"text": "..."}}, received {line[:80]!r}') from None
    if not prompts:
        raise InputError(f"text_file={path}: holds no prompt")
    return prompts


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to continue: the beginning-of-text token first where the model has one."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eod_id]


class ChatTemplate:
    """A model's Jinja template, which turns messages (``role``, ``content``) into the text that it was tuned on.

    Args:
        source: the template.
        place: where it comes from, for errors.
        special: names such as ``bos_token`` that the template may use.
    """

    def __init__(self, source: str, place: str, special: dict[str, str]) -> None:
        self.place = place
        self._special = special
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False, **settings)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(f"{place}, line {error.lineno}: no Jinja template ({error.message})") from None

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, ending where the assistant is to speak.

        Raises:
            InputError: the template refuses the messages, or uses something that it is not given.
        """
        values: dict[str, Any] = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            return self._template.render(**values, **self._special)
        except TemplateError as error:
            line = _line_of(error)
            raise InputError(f"{self.place}{line}: {error}") from None


def load_chat_template(tokenizer_folder: Path, given: str | None) -> ChatTemplate:
    """The template in ``given`` (a file), else the one that came with the tokenizer.

    Raises:
        InputError: there is none, or it is no template.
    """
    special = {"bos_token": "", "eos_token": "", **_special_names(tokenizer_folder)}
    path = Path(given).expanduser() if given is not None else tokenizer_folder / CHAT_TEMPLATE_FILE_NAME
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), str(path), special)
    if given is not None:
        raise InputError(f"chat_template={given}: there is no such file")
    inside = _hf_settings(tokenizer_folder).get("chat_template")
    if isinstance(inside, str):
        return ChatTemplate(inside, str(tokenizer_folder / _HF_SETTINGS_FILE_NAME), special)
    raise InputError(
        f"{tokenizer_folder}: the model brought no chat template ({CHAT_TEMPLATE_FILE_NAME}).\n      fix: name one "
        "with chat_template=FILE, or continue plain text with python -m nemo_llm.generate"
    )


def encode_chat(tokenizer: Tokenizer, template: ChatTemplate, messages: list[Message]) -> list[int]:
    """Ids of a conversation; the template's special tokens become tokens, names of tokens in messages do as well.

    (Hugging Face's ``apply_chat_template`` reads them so too.)
    """
    return encode_with_special(tokenizer, template.render(messages))


def encode_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which names of special tokens stand for these tokens."""
    backend: Any = getattr(tokenizer, "backend", None)
    if not hasattr(backend, "encode_special_tokens"):
        return tokenizer.encode(text)
    before = backend.encode_special_tokens
    backend.encode_special_tokens = False
    try:
        return tokenizer.encode(text)
    finally:
        backend.encode_special_tokens = before


def _special_names(folder: Path) -> dict[str, str]:
    found = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = _hf_settings(folder).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found


def _hf_settings(folder: Path) -> dict[str, Any]:
    path = folder / _HF_SETTINGS_FILE_NAME
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _line_of(error: BaseException) -> str:
    """``, line N`` of the template in which `error` was raised."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"
