"""A conversation that fits the model's window."""

from collections.abc import Callable

from nemo_llm.config.commands.generate import SamplingConfig
from nemo_llm.data.chat_format import Message
from nemo_llm.errors import InputError
from nemo_llm.inference.decoder import generate
from nemo_llm.inference.loaded_model import InferenceModel
from nemo_llm.inference.prompts import ChatPrompts


class Conversation:
    """Messages so far; the oldest turns are forgotten when the window is full.

    Args:
        system: message that stands before all others, or None.
    """

    def __init__(
        self, model: InferenceModel, prompts: ChatPrompts, sampling: SamplingConfig, system: str | None
    ) -> None:
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self._start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[Message] = []
        self.forgotten = 0
        """Messages that no longer fit the window."""

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.forgotten = [], 0

    def answer(self, text: str, on_text: Callable[[str], None]) -> str:
        """The model's answer to a message; a collective of all ranks.

        Raises:
            InputError: the message alone does not fit the window; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        room = self.model.max_length - self.sampling.max_new_tokens
        ids = self.prompts.encode([*self._start, *messages])
        while len(ids) > room:
            if len(messages) < 3:
                raise InputError(
                    f"the message has {len(ids)} tokens; with sampling.max_new_tokens={self.sampling.max_new_tokens} "
                    f"that is more than the model's window of {self.model.max_length}"
                )
            messages = messages[2:]  # a question and its answer
            self.forgotten += 2
            ids = self.prompts.encode([*self._start, *messages])
        (result,) = generate(self.model, [ids], self.sampling, 1, lambda _, piece: on_text(piece))
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        return result.text
