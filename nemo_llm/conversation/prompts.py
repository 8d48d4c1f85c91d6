"""Conversations up to where the assistant is to speak, as token ids: what generation and chat give a model."""

from collections.abc import Sequence

from nemo_llm.conversation.messages import Message
from nemo_llm.conversation.template import ChatTemplate, load_template
from nemo_llm.conversation.template_checks import content_form
from nemo_llm.conversation.template_tokens import TemplateEncoder
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
