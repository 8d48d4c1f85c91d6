"""LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353) on one linear layer.

``y = W x + s B A x``. Column-parallel layers: ``A`` is whole on every rank and ``B`` split as the outputs are.
Row-parallel layers: ``A`` is split as the inputs are and ``B`` whole. So what is communicated is ``[tokens, rank]``.
Each part of a fused layer has matrices of its own, as in Hugging Face's models; they run as one pair of products.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from nemo_llm.config.sections.peft import LoraConfig
from nemo_llm.peft.adapter import Placement
from nemo_llm.peft.linear import LinearPart, LinearPlace
from nemo_llm.peft.linear_adapter import LinearAdapter


class LoraAdapter(LinearAdapter):
    """Low-rank products for some parts of one linear layer; with DoRA also the length of each output row.

    Args:
        place: the layer.
        config: the method's settings.
        ranks: rank of each part that is adapted.
    """

    def __init__(self, place: LinearPlace, config: LoraConfig, ranks: dict[LinearPart, int]) -> None:
        super().__init__(place)
        self.config, self.ranks, self.dora = config, ranks, config.kind == "dora"
        weight = place.linear.weight
        for part, rank in ranks.items():
            name = place.part_name(part)
            self.add_split(
                f"{part.leaf}_a",
                weight.new_zeros(rank, place.in_features),
                f"{name}.lora_a",
                split_dim=None if place.column else 1,
                sums_tokens=place.column,
            )
            self.add_split(
                f"{part.leaf}_b",
                weight.new_zeros(part.rows, rank),
                f"{name}.lora_b",
                split_dim=0 if place.column else None,
                sums_tokens=not place.column,
            )
        if self.dora:
            lengths = place.take_apart(self._row_lengths(weight.float()))
            for part, length in zip(place.parts, lengths, strict=True):
                if part in ranks:
                    self.add_split(
                        f"{part.leaf}_magnitude",
                        length.to(weight.dtype),
                        f"{place.part_name(part)}.lora_magnitude",
                        split_dim=0 if place.column else None,
                        sums_tokens=not place.column,
                    )

    def initial_std(self, placement: Placement) -> float | None:
        """Of ``A``: that of Kaiming's uniform law with a = sqrt(5), as in PEFT; ``B`` starts at zero."""
        if not placement.name.endswith(".lora_a"):
            return None
        whole = self.place.in_features * (1 if self.place.column else self.place.group.size())
        return 1.0 / math.sqrt(3.0 * whole)

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs as they are, and the narrow product ``A x`` ``[..., sum of ranks]``."""
        place = self.place
        if place.tokens_exchanged or (self.config.dropout > 0.0 and self.training):
            return x, F.linear(F.dropout(place.enter(x), self.config.dropout, self.training), self._a())
        return _Narrow.apply(x, self._a())

    def after(
        self, kept: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the product to the layer's output."""
        place, low = self.place, self.place.narrow_in(kept)
        if not self.dora and not place.tokens_exchanged:
            # Under tensor parallelism the output can be what a collective handed on, which others may hold.
            if place.group.size() == 1:
                return _AddWide.apply(out, low, self._b()), bias
            return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self._b().t()).view_as(out), bias
        delta = place.leave(F.linear(low, self._b()))
        if not self.dora:
            return out + delta, bias
        inside = None if place.linear.skip_bias_add else place.linear.bias
        out = out if inside is None else out - inside
        out = self._factors() * (out + delta)
        return (out if inside is None else out + inside), bias

    def merge(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias, fp32 and of this rank, of the plain layer that does the same."""
        linear = self.place.linear
        weight = linear.weight.float() + self._b().float() @ self._a().float()
        if self.dora:
            weight = self._factors().float()[:, None] * weight
        return weight, None if linear.bias is None else linear.bias.float()

    def _a(self) -> torch.Tensor:
        """``[sum of ranks, in]``"""
        parts = [getattr(self, f"{part.leaf}_a") for part in self.ranks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _b(self) -> torch.Tensor:
        """``[out, sum of ranks]``, scaled: each part's matrix in its rows and its columns."""
        row, column, blocks = 0, 0, []
        for part in self.place.parts:
            if (rank := self.ranks.get(part)) is not None:
                blocks.append(_Block(part.rows, row, column, rank, self._scale(rank)))
                column += rank
            row += part.rows
        layout = _Layout(self.place.groups if len(self.place.parts) > 1 else 1, row, column, tuple(blocks))
        return _Blocks.apply(layout, *(getattr(self, f"{part.leaf}_b") for part in self.ranks))

    def _scale(self, rank: int) -> float:
        return self.config.alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _row_lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """Length of each output row of the whole weight: ``[out]``."""
        squares = weight.square().sum(1)
        if not self.place.column and self.place.group.size() > 1:
            torch.distributed.all_reduce(squares, group=self.place.group)
        return squares.sqrt()

    def _factors(self) -> torch.Tensor:
        """DoRA's learned length over the present one, ``[out]``; gradients do not flow through the latter (§4.3)."""
        place = self.place
        with torch.no_grad():
            present = self._row_lengths(place.linear.weight.float() + self._b().float() @ self._a().float())
        factors = []
        for part, length in zip(place.parts, place.take_apart(present), strict=True):
            if part in self.ranks:
                learned = getattr(self, f"{part.leaf}_magnitude")
                if place.tokens_exchanged and not place.column and place.group.size() > 1:
                    learned = copy_to_tensor_model_parallel_region(learned, group=place.group)
                factors.append(learned / length.to(learned.dtype))
            else:
                factors.append(torch.ones_like(length, dtype=place.linear.weight.dtype))
        return place.assemble(factors)


@dataclass(frozen=True)
class _Block:
    """Where one part's matrix ``[rows, rank]`` goes, ``row`` counted with the parts one after the other."""

    rows: int
    row: int
    column: int
    rank: int
    scale: float


@dataclass(frozen=True)
class _Layout:
    """``rows`` x ``columns`` in ``groups`` in which the parts' rows alternate."""

    groups: int
    rows: int
    columns: int
    blocks: tuple[_Block, ...]

    def find(self, whole: torch.Tensor, block: _Block) -> torch.Tensor:
        """The block's place in ``whole``, a view ``[groups, rows of the block / groups, rank]``."""
        by_group = whole.view(self.groups, self.rows // self.groups, self.columns)
        rows = slice(block.row // self.groups, (block.row + block.rows) // self.groups)
        return by_group[:, rows, block.column : block.column + block.rank]


class _Blocks(torch.autograd.Function):
    """Scaled matrices put into one, zero elsewhere: one small kernel for each, both ways."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *parts: torch.Tensor) -> torch.Tensor:
        ctx.layout = layout
        whole = parts[0].new_zeros(layout.rows, layout.columns)
        for block, part in zip(layout.blocks, parts, strict=True):
            torch.mul(part.view(layout.groups, -1, block.rank), block.scale, out=layout.find(whole, block))
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout, grad = ctx.layout, grads[0].contiguous()
        return None, *((layout.find(grad, b) * b.scale).view(b.rows, b.rank) for b in layout.blocks)


class _Narrow(torch.autograd.Function):
    """``x`` itself, for the frozen layer, and ``A x``: so that both gradients of ``x`` meet in one product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, a)
        return x.view_as(x), F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor, dlow: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, a = ctx.saved_tensors
        flat = dlow.flatten(0, -2)
        da = flat.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, da
        # The frozen layer alone reads this output, so that its gradient was made for here and may be changed in place.
        return dx.contiguous().flatten(0, -2).addmm_(flat, a).view_as(dx), da


class _AddWide(torch.autograd.Function):
    """``out + B low`` written over ``out``: one product, half of the memory traffic of a product and a sum."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(low, b)
        # Detached: the layer's output is a view that its own function returned, which autograd lets nobody change. No
        # one reads its values again: the layer's gradients need its inputs and weights alone.
        return out.detach().flatten(0, -2).addmm_(low.flatten(0, -2), b.t()).view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low, b = ctx.saved_tensors
        flat = grads[0].flatten(0, -2)
        return grads[0], (flat @ b).view_as(low), flat.t() @ low.flatten(0, -2)
