"""Generation: prompts of different lengths in batches, one token of each row at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_llm.config.commands.generate import SamplingConfig
from nemo_llm.conversation.template import ChatTemplate
from nemo_llm.conversation.turn_end import turn_end_ids
from nemo_llm.errors import ConfigError, InputError, Problem
from nemo_llm.inference.detokenize import TextStream
from nemo_llm.inference.loaded_model import InferenceModel
from nemo_llm.inference.sampling import Sampler
from nemo_llm.tokenizers.tokenizer import Tokenizer

OnText = Callable[[int, str], None]
"""Called with a prompt's number and the next piece of its text."""


@dataclass(frozen=True)
class Generation:
    """What followed one prompt. The token that ended it is in ``tokens`` and not in ``text``."""

    text: str
    tokens: list[int]
    finish_reason: Literal["length", "stop_token", "stop_string"]


def generate(
    model: InferenceModel,
    prompts: Sequence[list[int]],
    settings: SamplingConfig,
    batch_size: int,
    on_text: OnText | None = None,
    template: ChatTemplate | None = None,
) -> list[Generation]:
    """Continue every prompt (token ids); a collective of all ranks, with the same result on each.

    Args:
        template: the chat template of the prompts, which says what ends an answer; None: the one beside the tokenizer.

    Raises:
        InputError: a prompt that is empty or does not fit the model's window together with ``max_new_tokens``.
    """
    check_prompts(prompts, settings.max_new_tokens, model.max_length)
    ends = stop_ids(model.tokenizer, settings, template)
    # Prompts of similar length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    results: dict[int, Generation] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = _Batch(model, numbers, [prompts[number] for number in numbers], settings, ends, on_text)
        batch.run()
        results.update(zip(numbers, batch.results(), strict=True))
    return [results[number] for number in range(len(prompts))]


def check_prompts(prompts: Sequence[list[int]], max_new_tokens: int, max_length: int) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        InputError: naming the first such prompt, its length and the fix.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {number + 1} is empty: give it at least one token")
        if len(prompt) + max_new_tokens > max_length:
            room = max_length - len(prompt)
            fix = f"set sampling.max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
            raise InputError(
                f"prompt {number + 1} has {len(prompt)} tokens; with sampling.max_new_tokens={max_new_tokens} that is "
                f"more than the model's window of {max_length}.\n      fix: {fix}"
            )


def stop_ids(tokenizer: Tokenizer, settings: SamplingConfig, template: ChatTemplate | None = None) -> frozenset[int]:
    """Ids that end a text.

    Raises:
        ConfigError: a stop token that the tokenizer does not know.
    """
    if settings.ignore_eod:
        return frozenset()
    if settings.stop_tokens is None:
        return frozenset([*tokenizer.end_ids, *turn_end_ids(tokenizer, template)])
    known = {name: tokenizer.token_id(name) for name in settings.stop_tokens}
    if missing := [name for name, number in known.items() if number is None]:
        raise ConfigError(
            [
                Problem(
                    "sampling.stop_tokens", missing[0], "the tokenizer has no such token", "use sampling.stop for text"
                )
            ]
        )
    return frozenset(number for number in known.values() if number is not None)


class _OnItsWay:
    """Tokens that a GPU copies to the host. Waiting for them waits for nothing that was asked of the device later."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._tokens.copy_(tokens, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def tokens(self) -> torch.Tensor:
        """``[b]`` on the CPU."""
        self._arrived.synchronize()
        return self._tokens


class _Batch:
    """One batch while it is generated.

    On a GPU the host looks at a step's tokens one step late: by then the device has the next step to work on and does
    not wait.
    """

    def __init__(
        self,
        model: InferenceModel,
        numbers: list[int],
        prompts: list[list[int]],
        settings: SamplingConfig,
        ends: frozenset[int],
        on_text: OnText | None,
    ) -> None:
        self.model, self.numbers, self.prompts, self.settings = model, numbers, prompts, settings
        self.ends, self.on_text = ends, on_text
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[Literal["length", "stop_token", "stop_string"] | None] = [None] * len(prompts)
        self.streams = [TextStream(model.tokenizer, prompt, settings.stop) for prompt in prompts]

    def run(self) -> None:
        """Read the prompts and decode until every row has ended."""
        model, device, rows = self.model, self.model.device, len(self.prompts)
        longest = max(map(len, self.prompts))
        padded = torch.zeros(rows, longest, dtype=torch.int64)
        for row, prompt in enumerate(self.prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        sample = Sampler(self.settings, self.numbers, self.prompts, device)
        cache = model.new_cache(longest + self.settings.max_new_tokens)
        logits = model.read_prompts(cache, padded.to(device), lengths)
        late: _OnItsWay | None = None
        for step in range(self.settings.max_new_tokens):
            chosen = model.agree(None if logits is None else sample(logits, step), rows)
            if device.type == "cpu":
                if self._take(chosen):
                    return
            else:
                coming = _OnItsWay(chosen)
                if late is not None and self._take(late.tokens()):
                    return
                late = coming
            if step + 1 < self.settings.max_new_tokens:
                logits = model.decode(cache, chosen, lengths + step, longest + step)
        if late is not None:
            self._take(late.tokens())

    def results(self) -> list[Generation]:
        """What came of each row."""
        for row, stream in enumerate(self.streams):
            stream.finish()
            self._tell(row, final=True)
        return [
            Generation(stream.text, tokens, reason or "length")
            for stream, tokens, reason in zip(self.streams, self.tokens, self.reasons, strict=True)
        ]

    def _take(self, chosen: torch.Tensor) -> bool:
        """Add one token to each row that has not ended; true when all have."""
        for row, token in enumerate(chosen.tolist()):
            if self.reasons[row] is not None:
                continue
            self.tokens[row].append(token)
            if token in self.ends:
                self.reasons[row] = "stop_token"
                continue
            self.streams[row].add(token)
            if self.streams[row].stopped:
                self.reasons[row] = "stop_string"
            self._tell(row)
        return all(reason is not None for reason in self.reasons)

    def _tell(self, row: int, final: bool = False) -> None:
        if self.on_text is not None and (piece := self.streams[row].news(final)):
            self.on_text(self.numbers[row], piece)
