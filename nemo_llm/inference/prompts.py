"""Prompts from the command line, from files and from chat templates, as token ids."""

from collections.abc import Sequence
from pathlib import Path

from nemo_llm.corpus.documents import BadRecord, file_format, read_documents, read_lines
from nemo_llm.data.chat_format import Message
from nemo_llm.data.chat_template import ChatTemplate, load_template
from nemo_llm.data.template_checks import content_form
from nemo_llm.data.template_tokens import TemplateEncoder
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the field ``text`` of JSON lines or Parquet, else one a line; blank lines do not count.

    Raises:
        InputError: a file that is missing, empty or cannot be read, with the line.
    """
    if not path.is_file():
        raise InputError(f"text_file={path}: there is no such file")
    if file_format(path) == "text":
        prompts = [line for _, line in read_lines(path)]
    else:
        prompts = [document.text for document in read_documents(path, "text", _refuse_record)]
    if not prompts:
        raise InputError(f"text_file={path}: holds no prompt")
    return prompts


def _refuse_record(record: BadRecord) -> None:
    raise InputError(
        f'{record.file}, line {record.line}: expected {{"text": "..."}}, but {record.reason}: {record.detail}'
    )


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to continue: the beginning-of-text token first where the model has one."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eod_id]


class ChatPrompts:
    """Turns messages into ids as training did: by a chat template, whose control tokens become tokens.

    Names of control tokens in messages do as well. (Hugging Face's ``apply_chat_template`` reads them so too.)
    """

    def __init__(self, template: ChatTemplate, encoder: TemplateEncoder) -> None:
        self.template, self._encoder = template, encoder
        self._form = content_form(template)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak.

        Raises:
            InputError: the template refuses the messages.
        """
        fitting = [self._form.fit(message) for message in messages]
        return self._encoder.encode(self.template.render(fitting, add_generation_prompt=True))


def load_chat_prompts(tokenizer: Tokenizer, folder: Path, given: str | None) -> ChatPrompts:
    """By the template that ``chat_template`` names (a name or a file), else the one that came with the tokenizer.

    Raises:
        ConfigError: there is none.
        InputError: it is no template.
    """
    encoder = TemplateEncoder(tokenizer)
    return ChatPrompts(load_template(given, encoder, folder, "chat_template"), encoder)
