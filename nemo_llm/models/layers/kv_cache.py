"""Keys and values of the tokens so far, kept between the steps of generation.

The prompts of a batch stand at the left of their rows and each row grows at its own place: the token at position ``p``
of a row is in slot ``p``. So positions are exact, nothing is padded at the left, and a prompt is computed with plain
causal attention. What padding left in slots to the right is overwritten before anything looks at it.

Shapes: ``b`` rows, ``g`` key-value heads of this tensor-parallel rank, ``d`` head size.
"""

from typing import Any

import torch

from nemo_llm.models.layers.attention import CoreAttention


class KVCache:
    """The cache of all layers of one pipeline stage, for one batch.

    Args:
        num_slots: longest sequence that fits, generated tokens included.
        slot_step: decoding looks at a number of slots that is a multiple of this: 1 on CPU; larger where shapes must
            not change at every token.
        fused: let Triton's kernels (kernels/decode_attention.py) extend the cache and attend to it.
    """

    def __init__(self, num_slots: int, slot_step: int, fused: bool = False) -> None:
        self.fused = fused
        self.num_slots = -(-num_slots // slot_step) * slot_step
        self.slot_step = slot_step
        self.seen_slots = 0
        """Slots that decoding looks at."""
        self.positions: torch.Tensor | None = None
        """``[b]``: the slot of each row's present token while decoding; None while prompts are read."""
        self.recorded: Any = None
        """What inference/graphs.py recorded for this cache."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[int | None, torch.Tensor] = {}
        self._rows: torch.Tensor | None = None

    def read_prompts(self) -> None:
        """The next tokens are the beginnings of all rows."""
        self.positions = None

    def decode_at(self, positions: torch.Tensor, longest: int) -> None:
        """The next token of every row goes to ``positions`` ``[b]``, none of which is above ``longest``."""
        self.positions = positions
        self.seen_slots = -(-(longest + 1) // self.slot_step) * self.slot_step
        self._masks = {}

    def forget_masks(self) -> None:
        """Make the masks anew at the next step, though nothing changed."""
        self._masks = {}

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what a layer made of the prompts: ``[s, b, g, d]``."""
        length, rows = key.shape[:2]
        if layer not in self._layers:
            self._layers[layer] = (self._buffer(key), self._buffer(value))
            self._rows = torch.arange(rows, device=key.device)
        for buffer, new in zip(self._layers[layer], (key, value), strict=True):
            buffer[:, :, :length] = new.permute(1, 2, 0, 3)

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep one token of each row ``[1, b, g, d]``; returns all keys and values as ``[b, g, seen slots, d]``."""
        keys, values = self._layers[layer]
        keys[self._rows, :, self.positions] = key[0]
        values[self._rows, :, self.positions] = value[0]
        return keys[:, :, : self.seen_slots], values[:, :, : self.seen_slots]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        rule: tuple[float, int | None, float | None],
    ) -> torch.Tensor:
        """As `extend`, and attention of ``query`` ``[1, b, n, d]`` to what is kept: ``[1, b, n, d]``.

        Args:
            new: key and value ``[1, b, g, d]`` of the present tokens.
            rule: (factor on the logits, window or None, soft cap or None).
        """
        from nemo_llm.kernels.decode_attention import attend_to_cache

        assert self.positions is not None
        key, value = new
        cached = self._layers[layer]
        return attend_to_cache(query[0], (key[0], value[0]), cached, self.positions, self.seen_slots, rule)[None]

    def mask(self, window: int | None) -> torch.Tensor:
        """``[b, 1, 1, seen slots]``: true where the row's present token may look."""
        assert self.positions is not None
        if window not in self._masks:
            slots = torch.arange(self.seen_slots, device=self.positions.device)
            last = self.positions[:, None]
            allowed = slots <= last
            if window is not None:
                allowed = allowed & (slots > last - window)
            self._masks[window] = allowed[:, None, None]
        return self._masks[window]

    def _buffer(self, prompt: torch.Tensor) -> torch.Tensor:
        _, rows, groups, channels = prompt.shape
        # Zeros, not whatever memory held: a masked slot is multiplied by a weight of zero, which NaN would survive.
        return prompt.new_zeros(rows, groups, self.num_slots, channels)


def connect_cache(attentions: list[CoreAttention], cache: KVCache | None) -> None:
    """Let them use the cache; None: none."""
    for attention in attentions:
        attention.cache = cache


def cacheable_attentions(model: Any) -> list[CoreAttention] | None:
    """The attention of every layer of this stage; None where one does not know of the cache."""
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    return cores if all(isinstance(core, CoreAttention) for core in cores) else None
