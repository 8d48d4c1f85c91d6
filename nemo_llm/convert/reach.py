"""Lengths of text from which on a model computes otherwise, and which of them the gate reads beyond."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

# Bytes for each pair of tokens and head while one layer attends: scores and probabilities, both of them twice.
_BYTES_A_SCORE = 16
_MEMORY_SHARE = 0.5
# Llama 3's and YaRN's scalings name a length too, but change all positions alike: one looks where that is cheap.
_CHEAP_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Threshold:
    """A length in the configuration: texts that are longer are computed otherwise."""

    name: str
    length: int
    always_read: bool = True

    def __str__(self) -> str:
        return f"{self.name}={self.length}"


@dataclass(frozen=True, slots=True)
class Reach:
    """What a long text must show.

    Attributes:
        thresholds: of both configurations.
        layers: how many of the first layers have every kind of attention that occurs.
        heads: of one layer.
        longest: the longest text that the model takes; None where positions have no end.
    """

    thresholds: tuple[Threshold, ...]
    layers: int
    heads: int
    longest: int | None

    @classmethod
    def of(cls, model: Mapping[str, Any], theirs: Mapping[str, Any] | None = None) -> "Reach":
        """For a model section and, where there is one, the whole configuration that transformers made of the folder."""
        found = {*_ours(model), *(() if theirs is None else _theirs(theirs))}
        types = [] if theirs is None else theirs.get("layer_types") or []
        kinds = max((types.index(kind) + 1 for kind in set(types)), default=1)
        layers = min(model["num_layers"], max(kinds, model["window_attn_skip_freq"] or 1))
        longest = model["max_position_embeddings"] if model["position_embedding_type"] == "learned_absolute" else None
        thresholds = tuple(sorted(found, key=lambda threshold: (threshold.length, threshold.name)))
        return cls(thresholds, layers, model["num_attention_heads"], longest)

    def plan(self, seen: int) -> tuple[int | None, list[Threshold], list[Threshold]]:
        """The length of a text beyond all that can be read, those thresholds, and those that are left.

        Args:
            seen: length of the texts that were compared already.
        """
        beyond = [threshold for threshold in self.thresholds if threshold.length >= seen]
        read = [threshold for threshold in beyond if self._can_read(threshold)]
        length = _beyond(read[-1].length) if read else None
        return length, read, [threshold for threshold in beyond if threshold not in read]

    def _can_read(self, threshold: Threshold) -> bool:
        length = _beyond(threshold.length)
        needed = _BYTES_A_SCORE * self.heads * length**2
        room = _MEMORY_SHARE * psutil.virtual_memory().available
        within = self.longest is None or length <= self.longest
        return within and needed <= (room if threshold.always_read else min(room, _CHEAP_BYTES))


def _beyond(length: int) -> int:
    return length + max(32, length // 16)


def _ours(model: Mapping[str, Any]) -> Iterator[Threshold]:
    if model["window_size"] is not None:
        yield Threshold("model.window_size", model["window_size"])
    scaling = model["rope_scaling"]
    if scaling is not None and scaling["original_max_position_embeddings"]:
        name = "model.rope_scaling.original_max_position_embeddings"
        yield Threshold(name, scaling["original_max_position_embeddings"], scaling["type"] == "dynamic")


def _theirs(config: Mapping[str, Any]) -> Iterator[Threshold]:
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(config.get(name), int):
            yield Threshold(name, config[name])
    nested = config.get("rope_parameters") or {}
    scalings: Sequence[Any] = [nested, *nested.values()]
    for scaling in (part for part in scalings if isinstance(part, Mapping)):
        kind = scaling.get("rope_type")
        if kind == "dynamic":
            yield Threshold("max_position_embeddings", config["max_position_embeddings"])
        if isinstance(trained := scaling.get("original_max_position_embeddings"), int):
            yield Threshold("original_max_position_embeddings", trained, kind in ("dynamic", "longrope"))
