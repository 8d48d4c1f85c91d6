"""The token that ends a turn of the chat template which stands beside a saved tokenizer."""

from nemo_llm.assets import resolve_path
from nemo_llm.data.chat_template import load_template
from nemo_llm.data.template_checks import answer_end
from nemo_llm.data.template_tokens import TemplateEncoder
from nemo_llm.errors import NemoLlmError
from nemo_llm.tokenizers.tokenizer import Tokenizer


def turn_end_id(tokenizer: Tokenizer) -> int | None:
    """Id of the control token right behind an answer; None without a template, or with an end that is plain text."""
    if tokenizer.config.path is None:
        return None
    path = resolve_path(tokenizer.config.path, "tokenizers")
    try:
        folder = path.parent if path.is_file() else path
        template = load_template("tokenizer", TemplateEncoder(tokenizer), folder, "chat_template")
    except NemoLlmError:  # none there, or one that cannot be read: `chat` says so where it is asked for
        return None
    behind = (answer_end(template) or "").lstrip()
    if not behind.startswith(("<", "[")):
        return None
    known = (tokenizer.token_id(behind[:length]) for length in range(len(behind), 2, -1))
    return next((number for number in known if number is not None), None)
