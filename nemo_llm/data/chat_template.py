"""Chat templates: from messages to text, by a tokenizer's own Jinja template or a named one.

Templates run in Jinja's sandbox with the settings and helpers of ``transformers``, so that a template written for it
gives the same text here.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_llm.config.catalog import nearest
from nemo_llm.data.tokenizer import Tokenizer
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
"""Known by name; ``eod_token`` is the tokenizer's end-of-document token."""


class ChatTemplate:
    """Renders conversations.

    Attributes:
        source: the Jinja text, which is all that a checkpoint needs to keep of it.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source, self._variables = source, variables
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            rule = f"is no Jinja template: {error}"
            raise ConfigError([Problem("data.chat.template", source[:60], rule, "correct it")]) from error

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Text of a conversation; with ``add_generation_prompt`` up to where the next answer begins.

        Raises:
            InputError: the template refuses these messages.
        """
        import jinja2

        plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **self._variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from error


def load_template(name: str, tokenizer: Tokenizer, tokenizer_path: str | None) -> ChatTemplate:
    """The template that ``data.chat.template`` names.

    Raises:
        ConfigError: no such name, file, or template beside the tokenizer.
    """
    files = {} if tokenizer_path is None else _tokenizer_settings(Path(tokenizer_path))
    variables = {key: _token_text(files.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    variables["eod_token"] = tokenizer.decode([tokenizer.eod_id])
    if name == "tokenizer":
        source = files.get("chat_template")
        if not isinstance(source, str):
            rule = f"there is no chat template beside data.tokenizer.path = {tokenizer_path}"
            fix = f"name one of {', '.join(NAMED_TEMPLATES)}, or a Jinja file"
            raise ConfigError([Problem("data.chat.template", name, rule, fix)])
        return ChatTemplate(source, variables)
    if name in NAMED_TEMPLATES:
        return ChatTemplate(NAMED_TEMPLATES[name], variables)
    path = Path(name).expanduser()
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), variables)
    meant = nearest(name, ("tokenizer", *NAMED_TEMPLATES))
    rule = f"no such template and no such file; named ones are tokenizer, {', '.join(NAMED_TEMPLATES)}"
    raise ConfigError([Problem("data.chat.template", name, rule, f"did you mean {meant}?" if meant else "name one")])


def _tokenizer_settings(path: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` beside a tokenizer's file, with the template of a file of its own."""
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {}
    config = folder / "tokenizer_config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
    own = folder / TEMPLATE_FILE_NAME
    if own.is_file():
        settings["chat_template"] = own.read_text(encoding="utf-8")
    return settings


def _token_text(token: Any) -> str:
    """A special token, which Hugging Face writes as text or as a mapping."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
