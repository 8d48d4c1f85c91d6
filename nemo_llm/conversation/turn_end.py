"""The tokens that end a turn, and so a generated answer."""

from nemo_llm.conversation.template import ChatTemplate, load_template
from nemo_llm.conversation.template_checks import answer_end
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.errors import NemoLlmError
from nemo_llm.tokenizers.tokenizer import Tokenizer

# What ends a turn in the formats of ChatML, Llama 3, Gemma, Phi and Mistral, for models that brought no template.
_KNOWN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "</s>")


def turn_end_ids(tokenizer: Tokenizer, template: ChatTemplate | None = None) -> list[int]:
    """Ids that end a turn of a template (None: the one beside the tokenizer); without one, those of known formats."""
    template = template or saved_template(tokenizer)
    ends = map(tokenizer.token_id, _KNOWN_ENDS) if template is None else [turn_end_id(tokenizer, template)]
    return [end for end in ends if end is not None]


def turn_end_id(tokenizer: Tokenizer, template: ChatTemplate | None) -> int | None:
    """Id of the control token right behind an answer; None without a template, or with an end that is plain text."""
    behind = (answer_end(template) or "").lstrip() if template is not None else ""
    if not behind.startswith(("<", "[")):
        return None
    known = (tokenizer.token_id(behind[:length]) for length in range(len(behind), 2, -1))
    return next((number for number in known if number is not None), None)


def saved_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template beside a tokenizer; None where there is none, or one that cannot be read."""
    try:
        return load_template("tokenizer", TemplateEncoder(tokenizer), "chat_template")
    except NemoLlmError:  # `chat` says so where it is asked for
        return None
