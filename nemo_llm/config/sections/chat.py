"""The ``data.chat`` section: how conversations become tokens, and which of them are learned."""

from dataclasses import dataclass
from datetime import date
from typing import Literal

from nemo_llm.config.sections.fields import NonEmptyStr, PathStr, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig(Section):
    """Read by blend sources of the form ``{name: ..., chat: FILE}``."""

    template: PathStr
    """``tokenizer`` (the Jinja template beside the tokenizer's file), a named one, or the path of a Jinja file."""
    train_on: Literal["answers", "last_answer", "all"]
    """Tokens with loss. A message's own ``train`` field wins over ``answers`` and ``last_answer``."""
    too_long: Literal["drop", "truncate", "error"]
    """What happens to a conversation longer than ``data.seq_length`` + 1 tokens; counted in the cache's manifest."""
    system_prompt: str | None
    """Put before conversations that have none."""
    prompt_key: NonEmptyStr | None
    """With ``answer_key``: records of two fields, a question and its answer, whatever else they hold."""
    answer_key: NonEmptyStr | None
    date: NonEmptyStr | None = None
    """What a template writes as today's date, as YYYY-MM-DD; null refuses templates that write it."""

    def __post_init__(self) -> None:
        if (self.prompt_key is None) != (self.answer_key is None):
            raise ValueError("prompt_key and answer_key belong together: give both or neither")
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"date must be of the form YYYY-MM-DD, received {self.date!r}") from None
