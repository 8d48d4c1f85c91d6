"""Chat templates: from messages to text, by a tokenizer's own Jinja template, a named one or a file.

The one renderer of training, generation and chat. Templates run in Jinja's immutable sandbox with the settings, helpers
and variables of ``transformers``, so that a template written for it gives the same text here.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_llm.config.compose.catalog import nearest
from nemo_llm.config.compose.hf_tokenizer import read_json, token_text
from nemo_llm.data.chat_format import Message
from nemo_llm.data.template_tokens import TemplateEncoder
from nemo_llm.errors import ConfigError, InputError, Problem

TEMPLATE_FILE_NAME = "chat_template.jinja"

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


_SETTINGS_FILE_NAMES = ("special_tokens_map.json", "tokenizer_config.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# In what order transformers looks for a message's reasoning, which it hands on by the first two of these names.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# They stand around what a template writes inside {% generation %}. Neither is a character: no message can hold them.
_ANSWER_BEGINS, _ANSWER_ENDS = "\ud801", "\ud802"


class ChatTemplate:
    """Renders conversations.

    Attributes:
        source: the Jinja text.
        origin: the file or name that it came from, for messages.
        variables: what it may use beside the conversation, such as ``bos_token``.
    """

    def __init__(
        self,
        source: str,
        origin: str,
        variables: Mapping[str, str],
        today: Callable[[], datetime] = datetime.now,
    ) -> None:
        """``today`` says what ``strftime_now`` formats.

        Raises:
            InputError: the source is no Jinja template, with the line.
        """
        self.source, self.origin, self.variables = source, origin, dict(variables)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: today().strftime(form)
        environment.globals["dict"] = _DictMaker()
        environment.globals["namespace"] = _Namespace
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{origin}, line {error.lineno}: no Jinja template ({error.message})") from None
        except RecursionError:
            raise InputError(f"{origin}: no Jinja template (nested too deep)") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Text of a conversation; with ``add_generation_prompt`` up to where the next answer begins.

        Raises:
            InputError: the template refuses these messages, or they hold what no template can be given.
        """
        return self._render(messages, tools, documents, add_generation_prompt=add_generation_prompt)

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
        text = self._render(messages, tools, documents, mark_answers=True)
        spans, pieces, length, begin = [], [], 0, 0
        for piece in re.split(f"([{_ANSWER_BEGINS}{_ANSWER_ENDS}])", text):
            if piece == _ANSWER_BEGINS:
                begin = length
            elif piece == _ANSWER_ENDS:
                spans.append((begin, length))
            else:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself what an answer is, with ``{% generation %}``."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        **settings: bool,
    ) -> str:
        values = {
            "messages": [_with_reasoning(_plain(message, f"message {n}")) for n, message in enumerate(messages)],
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": settings.get("add_generation_prompt", False),
        }
        marks = {_MARK_ANSWERS: True} if settings.get("mark_answers") else {}
        try:
            return self._template.render(**self.variables, **values, **marks)
        except Exception as error:  # a template may fail in any way
            line = line_of(error)
            reason = str(error) or type(error).__name__
            raise InputError(f"the chat template {self.origin}{line} refuses the conversation: {reason}") from None


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


class _DictMaker:
    """What templates call as ``dict``: no class whose attributes lead elsewhere."""

    def __call__(self, *values: Any, **named: Any) -> dict:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict:
        return dict.fromkeys(*values)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace`` without names that begin with an underscore."""

    def __init__(self, /, *values: Any, **named: Any) -> None:
        names = dict(*values, **named)
        for name in names:
            _check_name(name)
        super().__init__(names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with _, received {name!r}")


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
    name: str | None,
    encoder: TemplateEncoder,
    folder: Path | None,
    key: str,
    today: Callable[[], datetime] = datetime.now,
) -> ChatTemplate:
    """The template that a key of the configuration names.

    Args:
        name: a name of `NAMED_TEMPLATES`, a file, or ``tokenizer`` (also None) for the one in ``folder``.
        folder: where the tokenizer's files are; None where it has none.
        key: the key of the configuration, for errors.
        today: what a template writes as today's date.

    Raises:
        ConfigError: no such name, file, or template beside the tokenizer.
        InputError: a file that cannot be read, or is no template.
    """
    settings = {} if folder is None else _tokenizer_settings(folder)
    named = ((part, token_text(settings.get(part))) for part in _SPECIAL_TOKENS)
    variables = {part: text for part, text in named if text is not None}
    bos_token = encoder.tokenizer.config.bos_token
    known = {} if bos_token is None else {"bos_token": bos_token}
    variables = {"eos_token": encoder.eod_text, **known, **variables, "eod_token": encoder.eod_text}
    if name is None or name == "tokenizer":
        return ChatTemplate(*_own_source(settings, folder, name, key), variables, today)
    if name in NAMED_TEMPLATES:
        return ChatTemplate(NAMED_TEMPLATES[name], name, variables, today)
    path = Path(name).expanduser()
    if path.is_file():
        return ChatTemplate(_read(path), str(path), variables, today)
    meant = nearest(name, ("tokenizer", *NAMED_TEMPLATES))
    rule = f"no such template and no such file; named ones are tokenizer, {', '.join(NAMED_TEMPLATES)}"
    raise ConfigError([Problem(key, name, rule, f"did you mean {meant}?" if meant else "name one")])


def _own_source(settings: Mapping[str, Any], folder: Path | None, name: str | None, key: str) -> tuple[str, str]:
    """(source, origin) of the template beside a tokenizer."""
    source, origin = settings.get("chat_template"), f"{folder}/{TEMPLATE_FILE_NAME}"
    if isinstance(source, list):  # several named ones
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = by_name.get("default")
        if not isinstance(source, str):
            rule = f"{folder} has the templates {', '.join(map(str, by_name))} and none is called default"
            raise ConfigError([Problem(key, name, rule, "write the one you mean to a file and name that")])
    if isinstance(source, str):
        return source, origin
    rule = f"there is no chat template beside the tokenizer ({folder})" if folder else "the tokenizer has no files"
    fix = f"name one of {', '.join(NAMED_TEMPLATES)}, or a Jinja file"
    raise ConfigError([Problem(key, name, f"{rule}: the model brought no chat template", fix)])


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


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of its special tokens, and the template, which may have a file of its own.

    Raises:
        InputError: one of them cannot be read.
    """
    settings: dict[str, Any] = {}
    for name in _SETTINGS_FILE_NAMES:
        settings.update(read_json(folder / name))
    if (folder / TEMPLATE_FILE_NAME).is_file():
        settings["chat_template"] = _read(folder / TEMPLATE_FILE_NAME)
    return settings


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def line_of(error: BaseException) -> str:
    """``, line N`` of the template in which `error` was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"
