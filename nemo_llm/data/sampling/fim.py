"""Fill-in-the-middle: documents rearranged so that a left-to-right model learns to fill gaps.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle" (arXiv:2207.14255). A document is
cut into prefix, middle and suffix at two random characters and written as

- PSM: ``<PRE> prefix <SUF> suffix <MID> middle``, or
- SPM: ``<PRE> <SUF> suffix <MID> prefix middle`` (the variant that shares its sentinels with PSM).

It is applied to each document of a sample ("context level"); what grows beyond the sample is cut off at its end.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_llm.config.sections.data import FimConfig
from nemo_llm.data.sampling.keyed_permutation import mix64
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.tokenizers.tokenizer import Tokenizer

_MIN_TOKENS = 4  # shorter pieces have nothing to fill


@dataclass(frozen=True, slots=True)
class FimRules:
    """How often and how documents are rearranged, with the ids of the three sentinels."""

    rate: float
    spm_rate: float
    prefix_id: int
    middle_id: int
    suffix_id: int
    tokenizer: Tokenizer

    def apply(self, document: NDArray[np.int64], key: int) -> NDArray[np.int64]:
        """Return one document's tokens [n], rearranged [n' >= n] or as they are; a pure function of (document, key)."""
        if len(document) < _MIN_TOKENS or _uniform(key, 0) >= self.rate:
            return document
        prefix, middle, suffix = self._cut(document, _uniform(key, 1), _uniform(key, 2))
        if _uniform(key, 3) < self.spm_rate:
            parts = [[self.prefix_id, self.suffix_id], suffix, [self.middle_id], prefix, middle]
        else:
            parts = [[self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def _cut(
        self, document: NDArray[np.int64], one: float, other: float
    ) -> tuple[list[int] | NDArray[np.int64], list[int] | NDArray[np.int64], list[int] | NDArray[np.int64]]:
        """Cut at two places drawn uniformly: between characters, or between tokens where the text does not give the
        same tokens again (a document whose beginning was cut off inside a character or word)."""
        low, high = sorted((one, other))
        text = self.tokenizer.decode(document.tolist())
        if "\ufffd" not in text and self.tokenizer.encode(text) == document.tolist():
            first, last = int(low * (len(text) + 1)), int(high * (len(text) + 1))
            prefix, middle, suffix = self.tokenizer.encode_batch([text[:first], text[first:last], text[last:]])
            return prefix, middle, suffix
        first, last = int(low * (len(document) + 1)), int(high * (len(document) + 1))
        return document[:first], document[first:last], document[last:]


def build_fim_rules(config: FimConfig | None, tokenizer: Tokenizer) -> FimRules | None:
    """Return the rules with the sentinels' ids; None without fill-in-the-middle. ConfigError for unknown sentinels."""
    if config is None:
        return None
    names = {
        "prefix_token": config.prefix_token,
        "middle_token": config.middle_token,
        "suffix_token": config.suffix_token,
    }
    ids = {key: tokenizer.token_id(token) for key, token in names.items()}
    problems = [
        Problem(f"data.fim.{key}", names[key], "is not in the tokenizer's vocabulary", "name a token that is")
        for key, number in ids.items()
        if number is None
    ]
    if problems:
        raise ConfigError(problems)
    prefix, middle, suffix = (number for number in ids.values() if number is not None)
    return FimRules(config.rate, config.spm_rate, prefix, middle, suffix, tokenizer)


def _uniform(key: int, draw: int) -> float:
    return (mix64(key ^ mix64(draw)) >> 11) / (1 << 53)
