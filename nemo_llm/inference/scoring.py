"""Log-likelihoods and greedy texts in bulk, for evaluation."""

from collections.abc import Iterator, Sequence

import torch

from nemo_llm.config.commands.generate import SamplingConfig
from nemo_llm.errors import InputError
from nemo_llm.inference.decoder import generate
from nemo_llm.inference.loaded_model import InferenceModel

_TOKENS_OF_A_BATCH = {"cpu": 1024, "cuda": 8192}


class ModelScorer:
    """Scores texts with a model; requests that ask for the same input are computed once.

    Args:
        generate_batch_size: prompts generated together.
    """

    def __init__(self, model: InferenceModel, generate_batch_size: int) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.max_length = model.max_length
        self.generate_batch_size = generate_batch_size
        self.classes = model.classes

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would give it.

        What exceeds the window is cut off at the left of the context, as lm-eval does it.
        """
        # Continuations of one token after the same context (multiple choice by letters) share their input.
        by_input: dict[tuple[int, ...], list[int]] = {}
        counts = []
        for number, (context, continuation) in enumerate(requests):
            whole = tuple([*context, *continuation][-(self.max_length + 1) :])
            counts.append(min(len(continuation), len(whole) - 1))
            by_input.setdefault(whole[:-1], []).append(number)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch in self._batches(list(by_input)):
            places = [
                (row, number, back)
                for row, tokens in enumerate(batch)
                for number in by_input[tokens]
                for back in range(counts[number], 0, -1)
            ]
            labels = [requests[number][1][-back] for _, number, back in places]
            wanted = [(len(batch[row]) - back) * len(batch) + row for row, _, back in places]
            losses, hits = self._losses(batch, labels, wanted)
            for (_, number, _), loss, hit in zip(places, losses, hits, strict=True):
                total, greedy = results[number]
                results[number] = (total - loss, greedy and hit > 0)
        return results

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """The likeliest continuations, each ended before any of ``stop``; too long prompts lose tokens at the left."""
        settings = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            top_k=None,
            top_p=None,
            min_p=None,
            repetition_penalty=1.0,
            stop=tuple(stop),
            stop_tokens=None,
            ignore_eod=False,
            seed=0,
        )
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InputError(
                f"{max_new_tokens} tokens are to be generated, and the model's window is {self.max_length}: no room "
                "for a prompt.\n      fix: ask for fewer, in the task's generation_kwargs.max_gen_toks"
            )
        cut = [prompt[-room:] for prompt in prompts]
        return [result.text for result in generate(self.model, cut, settings, self.generate_batch_size)]

    def classify(self, inputs: Sequence[list[int]]) -> list[list[float]]:
        """Logits of the head's classes after each input; too long ones lose tokens at the right, as in training."""
        by_input: dict[tuple[int, ...], list[float]] = {}
        cut = [tuple(tokens[: self.max_length]) for tokens in inputs]
        device = self.model.device
        for batch in self._batches(list(dict.fromkeys(cut))):
            lengths = torch.tensor([len(tokens) for tokens in batch], device=device)
            logits = self.model.head_logits(_padded(batch).to(device), lengths)
            by_input.update(zip(batch, logits.tolist(), strict=True))
        return [by_input[tokens] for tokens in cut]

    def _batches(self, inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Inputs of similar length together, the longest first: when memory does not suffice, it shows at once."""
        limit = _TOKENS_OF_A_BATCH[self.model.device.type]
        batch: list[tuple[int, ...]] = []
        for tokens in sorted(inputs, key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > limit:
                yield batch
                batch = []
            batch.append(tokens)
        if batch:
            yield batch

    def _losses(
        self, batch: list[tuple[int, ...]], labels: list[int], wanted: list[int]
    ) -> tuple[list[float], list[float]]:
        device = self.model.device
        losses, hits = self.model.losses(
            _padded(batch).to(device), torch.tensor(labels, device=device), torch.tensor(wanted, device=device)
        )
        return losses.double().tolist(), hits.tolist()


def _padded(batch: list[tuple[int, ...]]) -> torch.Tensor:
    """[b, s], zeros at the right; the longest row comes first."""
    padded = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
    for row, tokens in enumerate(batch):
        padded[row, : len(tokens)] = torch.tensor(tokens)
    return padded
