"""Decoding on a GPU as recorded CUDA graphs: a step of some hundred small kernels is launched at once."""

from collections.abc import Callable
from typing import Any

import torch

from nemo_llm.megatron.models import offer_fused_rope
from nemo_llm.models.layers.kv_cache import KVCache
from nemo_llm.models.layers.rope import rotate_fused

_WARM_UP_STEPS = 3
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class DecodeGraphs:
    """The decoding step of one batch, recorded once for each number of slots that it looks at.

    Args:
        step: computes logits ``[b, vocabulary]`` from tokens and positions, both ``[b]``; it must neither wait for the
            device nor depend on anything but the cache.
        config: Megatron's configuration; rotary embeddings are fused while decoding, where shapes never change.
    """

    def __init__(self, step: Step, cache: KVCache, rows: int, config: Any) -> None:
        self._step, self._cache, self._config = step, cache, config
        self._tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
        self._positions = torch.zeros(rows, dtype=torch.int64, device="cuda")
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """As ``step``; no position is above ``longest``. The result is overwritten by the next call."""
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        self._cache.decode_at(self._positions, longest)
        slots = self._cache.seen_slots
        if slots not in self._recorded:
            self._recorded[slots] = self._record()
        graph, logits = self._recorded[slots]
        graph.replay()
        return logits

    def _record(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        before = self._config.apply_rope_fusion
        self._config.apply_rope_fusion = True
        offer_fused_rope(rotate_fused)
        try:
            # The same token again and again: keys and values of its slot are written anew, to the same effect.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_STEPS):
                    self._cache.forget_masks()
                    self._step(self._tokens, self._positions)
            torch.cuda.current_stream().wait_stream(stream)
            self._cache.forget_masks()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._step(self._tokens, self._positions)
            self._pool = graph.pool()
            # The masks that were made while recording belong to the graph.
            self._cache.forget_masks()
            return graph, logits
        finally:
            self._config.apply_rope_fusion = before
