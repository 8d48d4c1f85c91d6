"""The messages of a chat, as far as they fit the model's window."""

from nemo_llm.conversation.messages import Message
from nemo_llm.conversation.prompts import ChatPrompts
from nemo_llm.errors import InputError


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
