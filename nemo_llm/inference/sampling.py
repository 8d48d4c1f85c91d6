"""The next token of each row from its logits."""

import numpy as np
import torch

from nemo_llm.config.commands.generate import SamplingConfig


class Sampler:
    """Chooses tokens for one batch.

    A row's random numbers follow from the seed and the row's number alone: a prompt gives the same text in any batch,
    and on any layout.

    Args:
        settings: temperature, cut-offs, penalty, seed.
        numbers: each row's number among all prompts.
        prompts: each row's tokens, which the repetition penalty counts too.
    """

    def __init__(
        self, settings: SamplingConfig, numbers: list[int], prompts: list[list[int]], device: torch.device
    ) -> None:
        self.settings = settings
        self._seen: list[torch.Tensor] | torch.Tensor | None = None
        self._uniform: torch.Tensor | None = None
        self._rows = torch.arange(len(prompts), device=device)
        if settings.repetition_penalty != 1.0:
            self._seen = [torch.tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
        if settings.temperature > 0:
            # [row, step]: one number draws one token, by the inverse of the cumulative distribution.
            drawn = [
                np.random.Generator(np.random.Philox([settings.seed, number])).random(settings.max_new_tokens)
                for number in numbers
            ]
            self._uniform = torch.tensor(np.stack(drawn), dtype=torch.float64, device=device)

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """``[b]`` tokens from ``[b, vocabulary]`` logits in float32, the ``step``-th (from 0) of each row."""
        if self._seen is not None:
            logits = self._penalise(logits)
        if self._uniform is None:
            tokens = logits.argmax(-1)
        else:
            probabilities = cut_off(logits / self.settings.temperature, self.settings).double()
            cumulative = probabilities.cumsum(-1)
            target = self._uniform[:, step : step + 1] * cumulative[:, -1:]
            # The first token whose cumulative probability is above the target: never one of probability zero.
            tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
        if isinstance(self._seen, torch.Tensor):
            self._seen[self._rows, tokens] = True
        return tokens

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        if isinstance(self._seen, list):
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(self._seen):
                seen[row, prompt[prompt < logits.shape[-1]]] = True
            self._seen = seen
        penalty = self.settings.repetition_penalty
        return torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def cut_off(logits: torch.Tensor, settings: SamplingConfig) -> torch.Tensor:
    """Probabilities ``[b, vocabulary]`` after top-k, top-p and min-p, in this order; they need not sum to 1."""
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        threshold = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(-1)
    if settings.top_p is not None and settings.top_p < 1:
        ordered = probabilities.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        # The smallest probability that is still needed to reach top_p.
        threshold = ordered.masked_fill(before >= settings.top_p, torch.inf).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0)
    if settings.min_p is not None:
        threshold = settings.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0)
    return probabilities
