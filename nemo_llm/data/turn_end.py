"""The token that ends a turn of the chat template which stands beside a saved tokenizer."""

from nemo_llm.data.chat_template import load_template
from nemo_llm.data.tokenizer import Tokenizer
from nemo_llm.errors import NemoLlmError

_QUESTION, _ANSWER = "What is it?", "It is this."


def turn_end_id(tokenizer: Tokenizer) -> int | None:
    """Id of the control token right behind an answer; None without a template, or with an end that is plain text."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = load_template("tokenizer", tokenizer, tokenizer.config.path).render(messages)
    except NemoLlmError:  # none there, or one that wants other messages
        return None
    _, answer, behind = text.rpartition(_ANSWER)
    behind = behind.lstrip()
    if not answer or not behind.startswith(("<", "[")):
        return None
    known = (tokenizer.token_id(behind[:length]) for length in range(len(behind), 2, -1))
    return next((number for number in known if number is not None), None)
