"""What generation and chat give a model: conversations up to where the assistant is to speak, and plain text.

`ChatHistory` keeps the messages of a chat, as far as they fit the model's window.
"""

from collections.abc import Sequence

from nemo_llm.conversation.messages import Message
from nemo_llm.conversation.template import ChatTemplate, load_template
from nemo_llm.conversation.template_checks import content_form
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.corpus.documents import BadRecord, expand_inputs, file_format, read_documents, read_lines
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer


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


def load_chat_prompts(tokenizer: Tokenizer, given: str | None) -> ChatPrompts:
    """By the template that ``chat_template`` names (a name or a file), else the one that came with the tokenizer.

    Raises:
        ConfigError: there is none.
        InputError: it is no template.
    """
    encoder = TemplateEncoder(tokenizer)
    return ChatPrompts(load_template(given, encoder, "chat_template"), encoder)


class ChatHistory:
    """Messages so far; the oldest turns are forgotten when the window is full.

    Args:
        window: most tokens that the model reads and writes.
        answer_tokens: how many of them are kept free for the next answer (``sampling.max_new_tokens``).
        system: message that stands before all others, or None.
    """

    def __init__(self, prompts: ChatPrompts, window: int, answer_tokens: int, system: str | None) -> None:
        self.prompts, self.window, self.answer_tokens = prompts, window, answer_tokens
        self._start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = []

    def ask(self, text: str) -> list[int]:
        """Add a user's message; ids of what the model is to answer.

        Raises:
            InputError: the message alone does not fit the window; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.prompts.encode([*self._start, *messages])
        while len(ids) > self.window - self.answer_tokens:
            if len(messages) < 3:
                raise InputError(
                    f"the message has {len(ids)} tokens; with sampling.max_new_tokens={self.answer_tokens} that is "
                    f"more than the model's window of {self.window}"
                )
            messages = messages[2:]  # a question and its answer
            ids = self.prompts.encode([*self._start, *messages])
        self.messages = messages
        return ids

    def answer(self, text: str) -> None:
        """Add the assistant's answer to what was asked last."""
        self.messages.append({"role": "assistant", "content": text})


def read_prompts(pattern: str) -> list[str]:
    """Prompts of a file, folder or glob: the field ``text`` of JSON lines or Parquet, else one a line.

    Blank lines do not count.

    Raises:
        InputError: a file that is missing, empty or cannot be read, with the line.
    """
    prompts: list[str] = []
    for path in expand_inputs(pattern):
        if file_format(path) == "text":
            prompts += [line for _, line in read_lines(path)]
        else:
            prompts += [document.text for document in read_documents(path, "text", _refuse_record)]
    if not prompts:
        raise InputError(f"text_file={pattern}: holds no prompt")
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
