"""Chat templates: from messages to text, by a tokenizer's own Jinja template, a named one or a file.

The one renderer of training, generation and chat. Templates run in Jinja's immutable sandbox with the settings, helpers
and variables of ``transformers``, so that a template written for it gives the same text here.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext

from nemo_llm.checkpoint.saved_run import TEMPLATE_FILE_NAME
from nemo_llm.config.compose.catalog import nearest
from nemo_llm.config.compose.hf_tokenizer import read_json, token_text
from nemo_llm.conversation.messages import Message
from nemo_llm.conversation.sandbox import SandboxedTemplate, read_source, sandbox
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.errors import ConfigError, InputError, Problem

MORE_TEMPLATES = "additional_chat_templates"

NAMED_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
        "+ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eod_token + '\\n\\n' }}"
        "{% else %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}{% endif %}{% endfor %}"
    ),
    "plain": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + eod_token + '\\n' }}"
        "{% else %}{{ message['role'] + ': ' + message['content'] + '\\nassistant: ' }}{% endif %}{% endfor %}"
    ),
}
"""Known by name; ``eod_token`` is the tokenizer's end-of-document token, which a saved template writes out."""


_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# In what order transformers looks for a message's reasoning, which it hands on by the first two of these names.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# They stand around what a template writes inside {% generation %}. Neither is a character: no message can hold them.
_ANSWER_BEGINS, _ANSWER_ENDS = "\ud801", "\ud802"


class ChatTemplate(SandboxedTemplate):
    """Renders conversations.

    Attributes:
        source: the Jinja text.
        origin: the file or name that it came from, for messages.
        variables: what it may use beside the conversation, such as ``bos_token``.
    """

    def __init__(
        self, source: str, origin: str, variables: Mapping[str, str], today: Callable[[], datetime] = datetime.now
    ) -> None:
        """``today`` says what ``strftime_now`` formats.

        Raises:
            InputError: the source is no Jinja template, with the line.
        """
        self.variables = dict(variables)
        extensions = [_Generation, jinja2.ext.loopcontrols]
        environment = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: today().strftime(form)
        super().__init__(source, origin, environment)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        mark_answers: bool = False,
    ) -> str:
        """Text of a conversation; with ``add_generation_prompt`` up to where the next answer begins.

        With ``mark_answers`` two halves of characters stand around what the template marks as an answer.

        Raises:
            InputError: the template refuses these messages, or they hold what no template can be given.
        """
        values = {
            "messages": [_with_reasoning(_plain(message, f"message {n}")) for n, message in enumerate(messages)],
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
            _MARK_ANSWERS: mark_answers,
        }
        return self.fill({**self.variables, **values}, f"the chat template {self.origin}", " refuses the conversation")

    def render_with_answers(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of a conversation and the stretches of it that the template marks with ``{% generation %}``.

        Raises:
            InputError: as in `render`.
        """
        text = self.render(messages, tools=tools, documents=documents, mark_answers=True)
        spans, pieces, length = [], [], 0
        begins: list[int] = []
        for piece in re.split(f"([{_ANSWER_BEGINS}{_ANSWER_ENDS}])", text):
            if piece == _ANSWER_BEGINS:
                begins.append(length)
            elif piece == _ANSWER_ENDS and begins:
                spans.append((begins.pop(), length))
            elif piece != _ANSWER_ENDS:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself what an answer is, with ``{% generation %}``."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None


# By this name a template's context says that answers are to be marked; templates cannot write it.
_MARK_ANSWERS = "mark answers"


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``, which says what an answer is: it changes no text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own form)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_answer", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _answer(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{_ANSWER_BEGINS}{text}{_ANSWER_ENDS}" if context.get(_MARK_ANSWERS) else text


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _with_reasoning(message: Message) -> Message:
    """A message whose reasoning has every name by which templates know it, as transformers hands it on."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any, where: str) -> Any:
    """A copy made of what JSON holds.

    Raises:
        InputError: anything else, and halves of surrogate pairs, which are no characters.
    """
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: the text has a lone surrogate at character {error.start}, which is no character"
                ) from None
            return value
        case Mapping():
            return {_plain(key, where): _plain(part, f"{where}, {key}") for key, part in value.items()}
        case list() | tuple():
            return [_plain(part, where) for part in value]
    raise InputError(f"{where}: holds {type(value).__name__}, which is neither text, number, list nor mapping")


def load_template(
    name: str | None, encoder: TemplateEncoder, key: str, today: Callable[[], datetime] = datetime.now
) -> ChatTemplate:
    """The template that a key of the configuration names.

    Args:
        name: ``tokenizer`` (also None) for the one beside the tokenizer, the name of another there, a name of
            `NAMED_TEMPLATES`, or a file.
        key: the key of the configuration, for errors.
        today: what a template writes as today's date.

    Raises:
        ConfigError: no such name, file, or template beside the tokenizer.
        InputError: a file that cannot be read, or is no template.
    """
    folder = encoder.tokenizer.folder
    files = [] if folder is None else [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    settings = {key: value for file in files for key, value in read_json(file).items()}
    special = ((part, token_text(settings.get(part))) for part in _SPECIAL_TOKENS)
    variables = {part: text for part, text in special if text is not None}
    bos_token = encoder.tokenizer.config.bos_token
    known = {} if bos_token is None else {"bos_token": bos_token}
    variables = {"eos_token": encoder.eod_text, **known, **variables, "eod_token": encoder.eod_text}
    own = {} if folder is None else _own_templates(settings, folder)
    if name is None or name == "tokenizer":
        return ChatTemplate(_default_source(own, folder, name, key), f"{folder}/{TEMPLATE_FILE_NAME}", variables, today)
    named = {**own, **NAMED_TEMPLATES}
    if name in named:
        return ChatTemplate(named[name], name, variables, today)
    path = Path(name).expanduser()
    if path.is_file():
        return ChatTemplate(read_source(path), str(path), variables, today)
    meant = nearest(name, ("tokenizer", *named))
    rule = f"no such template and no such file; named ones are tokenizer, {', '.join(named)}"
    raise ConfigError([Problem(key, name, rule, f"did you mean {meant}?" if meant else "name one")])


def _own_templates(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Templates beside a tokenizer by their names, one without a name as ``default``; files hide those in settings."""
    files = {path.stem: read_source(path) for path in sorted(folder.glob(f"{MORE_TEMPLATES}/*.jinja"))}
    if (folder / TEMPLATE_FILE_NAME).is_file():
        files["default"] = read_source(folder / TEMPLATE_FILE_NAME)
    listed = settings.get("chat_template")
    if isinstance(listed, str):
        listed = [{"name": "default", "template": listed}]
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    return files or {str(entry.get("name")): str(entry["template"]) for entry in entries if entry.get("template")}


def _default_source(own: Mapping[str, str], folder: Path | None, name: str | None, key: str) -> str:
    """The template beside a tokenizer; where there is one for tools, both as one, as transformers chooses them."""
    if "default" not in own:
        rule = f"there is no chat template beside the tokenizer ({folder})" if folder else "the tokenizer has no files"
        fix = f"name one of {', '.join([*own, *NAMED_TEMPLATES])}, or a Jinja file"
        if own:
            raise ConfigError([Problem(key, name, f"{folder} has {', '.join(own)} and none is called default", fix)])
        raise ConfigError([Problem(key, name, f"{rule}: the model brought no chat template", fix)])
    if "tool_use" not in own:
        return own["default"]
    # A + keeps white space around a tag, and Jinja drops one line feed at the end of a whole template.
    with_tools, without = (own[part].removesuffix("\n") for part in ("tool_use", "default"))
    return f"{{%+ if tools is not none +%}}{with_tools}{{%+ else +%}}{without}{{%+ endif +%}}"


def fixed_day(day: str | None) -> Callable[[], datetime]:
    """Today's date as training knows it: the one that was set (YYYY-MM-DD); None refuses templates that write it."""

    def today() -> datetime:
        if day is None:
            raise jinja2.TemplateError(
                "it writes today's date, so that tokens would depend on the day; set data.chat.date, such as "
                f"{date.today().isoformat()}"
            )
        return datetime.fromisoformat(day)

    return today


def save_template(template_source: str, folder: Path) -> None:
    """Write a template beside a saved tokenizer, in place of the one that came with it."""
    (folder / TEMPLATE_FILE_NAME).write_text(template_source, encoding="utf-8")
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    config = folder / "tokenizer_config.json"
    settings = read_json(config)
    if settings.pop("chat_template", None) is not None:
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def saved_source(template: ChatTemplate, encoder: TemplateEncoder) -> str:
    """What a checkpoint keeps of a template: its source, which then needs no variable that is known here alone."""
    if "eod_token" not in template.source or encoder.eod_name is None or template.source.startswith(_EOD_IS):
        return template.source
    return f"{_EOD_IS}{json.dumps(encoder.eod_name, ensure_ascii=False)} %}}{template.source}"


_EOD_IS = "{% set eod_token = "
