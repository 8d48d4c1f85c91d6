"""Experts of a mixture by grouped products: one for all experts of a rank, whatever their number.

A router sends each of ``T`` tokens to ``k`` experts. The ``R = T * k`` (token, expert) pairs are *rows*, sorted by
expert, so that the rows of expert ``e`` are ``starts[e]`` up to ``starts[e + 1]`` (dropless mixtures as grouped
products: MegaBlocks, arXiv:2211.15841). On CUDA a product of all experts is one launch (kernels/grouped_experts.py) and
the host waits for nothing; on a CPU it is a loop over the experts. Each expert stays a module of its own with its own
weights, as in Megatron's `SequentialMLP`: names, checkpoints, first weights and optimizers know no difference.

Where one rank holds all experts and each expert whole, tokens are neither copied nor sent: `LocalDispatcher` says which
rows a token has, the first product reads its rows from the tokens, and the last sum writes tokens. Elsewhere
Megatron's dispatcher brings rows that are sorted already.

Shapes: tokens ``[T, h]``, experts' hidden units ``f`` (a part of them under expert tensor parallelism).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_llm.config.checks.code_paths import keeps_tokens_here, why_not_grouped
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.kernels.matmul import add_weight_gradient, take_stale
from nemo_llm.models.layers.main_grad import gradient_buffer, returned_gradient

_ROWS_A_TILE = 128  # of the products on CUDA; the last tile of an expert is filled up to it


@dataclass(frozen=True)
class Routes:
    """Which rows belong to which expert, and to which token where the tokens are here; on the tokens' device.

    Attributes:
        rows: ``R``.
        starts: ``[E + 1]`` int32, the first row of each expert, then ``R``.
        tokens: ``[R]`` int32, the token of each row; None for rows that came from other ranks.
        places: ``[R]`` int32, ``token * k + choice`` of each row, or None.
        rows_of_token: ``[T, k]`` int32, or None.
        tile_experts: ``[tiles]`` int32, the expert of each tile of rows; ``E`` for a tile that is not needed.
        tile_rows: ``[tiles]`` int32, the first row of each tile.
    """

    rows: int
    starts: torch.Tensor
    tokens: torch.Tensor | None
    places: torch.Tensor | None
    rows_of_token: torch.Tensor | None
    tile_experts: torch.Tensor
    tile_rows: torch.Tensor
    rows_a_tile: int = _ROWS_A_TILE


def routes_of_choices(chosen: torch.Tensor, experts: int) -> Routes:
    """Sort the rows of tokens that are here by expert; within an expert tokens keep their order.

    Args:
        chosen: ``[T, k]`` numbers of experts.
    """
    by_expert, order = torch.sort(chosen.flatten(), stable=True)
    count = order.numel()
    rows_of_token = torch.empty(count, dtype=torch.int32, device=chosen.device)
    rows_of_token[order] = torch.arange(count, dtype=torch.int32, device=chosen.device)
    numbers = torch.arange(experts + 1, dtype=by_expert.dtype, device=chosen.device)
    starts = torch.searchsorted(by_expert, numbers, out_int32=True)
    places = order.to(torch.int32)
    return Routes(
        count, starts, places // chosen.shape[1], places, rows_of_token.view_as(chosen), *_tiles(starts, count)
    )


def routes_of_counts(counts: torch.Tensor, device: torch.device) -> Routes:
    """Rows that lie sorted already.

    Args:
        counts: ``[E]`` rows of each expert, on the CPU.
    """
    starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    rows = int(starts[-1])
    starts = starts.to(device, non_blocking=True)
    return Routes(rows, starts, None, None, None, *_tiles(starts, rows))


def _tiles(starts: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert and first row of each tile; as many tiles as any distribution of the rows can need."""
    experts = starts.numel() - 1
    tiles = (starts.diff() + _ROWS_A_TILE - 1) // _ROWS_A_TILE
    ends = tiles.cumsum(0)
    number = torch.arange(rows // _ROWS_A_TILE + min(experts, rows), device=starts.device)
    tile_experts = torch.searchsorted(ends, number, right=True)
    inside = tile_experts.clamp(max=experts - 1)
    tile_rows = starts[inside] + (number - (ends - tiles)[inside]) * _ROWS_A_TILE
    return tile_experts.to(torch.int32), tile_rows.to(torch.int32)


class ExpertProducts(torch.autograd.Function):
    """All experts on their rows: ``fc2(silu(gate) * up * share)`` with ``gate, up = fc1(x)`` (arXiv:2002.05202)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        share: torch.Tensor,
        routes: Routes,
        weights: Sequence[torch.Tensor],
        *announced: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens ``[T, h]`` and shares ``[T, k]`` -> ``[T, h]``; or rows ``[R, h]`` and ``[R]`` -> ``[R, h]``.

        Args:
            weights: ``fc1`` ``[2f, h]`` of every expert, then ``fc2`` ``[h, f]`` of every expert.
            announced: the same, or nothing where autograd need not hear of their gradients: they go into ``main_grad``,
                and to tell autograd of hundreds of weights takes the host as long as the GPU takes for a layer.
        """
        fc1, fc2 = _halves(weights)
        by, here = _kernels(x), routes.tokens is not None
        before = by.grouped_product(x, fc1, routes, transposed=True, gather=here)
        hidden = by.weighted_swiglu(before, share, routes)
        rows = by.grouped_product(hidden, fc2, routes, transposed=True, gather=False)
        ctx.save_for_backward(x, share, before)
        ctx.routes, ctx.weights, ctx.announced = routes, weights, bool(announced)
        return by.sum_of_rows(rows, routes) if here else rows

    @staticmethod
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``x``, ``share`` and the weights; the latter go into ``main_grad`` where there is one."""
        x, share, before = ctx.saved_tensors
        (fc1, fc2), routes = _halves(ctx.weights), ctx.routes
        by, here = _kernels(x), routes.tokens is not None
        output_grad = output_grad.contiguous()
        hidden_grad = by.grouped_product(output_grad, fc2, routes, transposed=False, gather=here)
        before_grad, share_grad, hidden = by.weighted_swiglu_backward(hidden_grad, before, share, routes)
        rows_grad = by.grouped_product(before_grad, fc1, routes, transposed=False, gather=False)
        x_grad = by.sum_of_rows(rows_grad, routes) if here else rows_grad
        del hidden_grad, rows_grad
        gradients: list[torch.Tensor | None] = []
        if fc1[0].requires_grad:  # else all are frozen
            # A copy of each row is faster than reading the rows of the tokens in every tile of the product.
            rows = routes.tokens if here else None
            buffers1 = _add_weight_gradients(by, fc1, before_grad, x if rows is None else x[rows], routes)
            after = output_grad if rows is None else output_grad[rows]
            buffers2 = _add_weight_gradients(by, fc2, after, hidden, routes)
            if ctx.announced:
                pairs = zip(ctx.weights, buffers1 + buffers2, strict=True)
                gradients = [returned_gradient(weight, buffer) for weight, buffer in pairs]
        elif ctx.announced:
            gradients = [None] * len(ctx.weights)
        return x_grad, share_grad.to(share.dtype), None, None, *gradients


def _halves(weights: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    return weights[: len(weights) // 2], weights[len(weights) // 2 :]


def _add_weight_gradients(
    by: Any, weights: Sequence[torch.Tensor], output_grad: torch.Tensor, x: torch.Tensor, routes: Routes
) -> list[torch.Tensor]:
    buffers = [gradient_buffer(weight) for weight in weights]
    stale = [take_stale(buffer) for buffer in buffers]
    if any(stale) and not all(stale):
        torch._foreach_zero_([buffer for buffer, old in zip(buffers, stale, strict=True) if old])
    by.add_grouped_weight_gradient(buffers, output_grad, x, routes, overwrite=all(stale))
    return buffers


def _kernels(x: torch.Tensor) -> Any:
    if not x.is_cuda:
        return _Loops
    from nemo_llm.kernels import grouped_experts

    return grouped_experts


class _Loops:
    """The functions of kernels/grouped_experts.py for a CPU, one expert after another."""

    @staticmethod
    def grouped_product(
        x: torch.Tensor, weights: Sequence[torch.Tensor], routes: Routes, transposed: bool, gather: bool
    ) -> torch.Tensor:
        rows = x[routes.tokens] if gather else x
        pairs = zip(rows.split(routes.starts.diff().tolist()), weights, strict=True)
        return torch.cat([piece @ (weight.t() if transposed else weight) for piece, weight in pairs])

    @staticmethod
    def weighted_swiglu(x: torch.Tensor, weight: torch.Tensor, routes: Routes) -> torch.Tensor:
        gate, up = x.float().chunk(2, -1)
        return (F.silu(gate) * up * _by_row(weight, routes)).to(x.dtype)

    @staticmethod
    def weighted_swiglu_backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, routes: Routes
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = x.float().chunk(2, -1)
        share, sigmoid = _by_row(weight, routes), torch.sigmoid(gate)
        silu, gradient = gate * sigmoid, dy.float()
        by_row = (gradient * silu * up).sum(-1)
        if routes.places is None:
            share_grad = by_row
        else:
            share_grad = torch.empty_like(by_row)
            share_grad[routes.places] = by_row
        gradient = gradient * share
        dgate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dx = torch.cat((dgate, gradient * silu), -1).to(x.dtype)
        return dx, share_grad.view_as(weight), (silu * up * share).to(x.dtype)

    @staticmethod
    def sum_of_rows(y: torch.Tensor, routes: Routes) -> torch.Tensor:
        return y[routes.rows_of_token].sum(1, dtype=torch.float32).to(y.dtype)

    @staticmethod
    def add_grouped_weight_gradient(
        buffers: Sequence[torch.Tensor], output_grad: torch.Tensor, x: torch.Tensor, routes: Routes, overwrite: bool
    ) -> None:
        counts = routes.starts.diff().tolist()
        for buffer, left, right in zip(buffers, output_grad.split(counts), x.split(counts), strict=True):
            if overwrite:
                buffer.zero_()
            if left.shape[0]:
                add_weight_gradient(buffer, left, right)


def _by_row(weight: torch.Tensor, routes: Routes) -> torch.Tensor:
    return (weight if routes.places is None else weight.flatten()[routes.places]).float()[:, None]


class GroupedExperts(SequentialMLP):
    """Megatron's experts, computed by `ExpertProducts` as long as nothing is attached to their linear layers."""

    announces_gradients = True
    """False where nobody waits for a single weight's gradient: all are in ``main_grad`` and summed at the end."""

    def forward(
        self, hidden: torch.Tensor, routes: Routes | torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Tokens of `LocalDispatcher` with its routes, or sorted rows with the number of rows of each expert."""
        if self.is_plain():
            if not isinstance(routes, Routes):
                routes = routes_of_counts(routes.cpu(), hidden.device)
            weights = self.weights()
            announced = weights if self.announces_gradients else ()
            return ExpertProducts.apply(hidden, share, routes, weights, *announced), None
        if not isinstance(routes, Routes):
            return super().forward(hidden, routes, share)
        assert routes.tokens is not None
        rows, _ = super().forward(hidden[routes.tokens], routes.starts.diff(), share.flatten()[routes.places])
        return _Loops.sum_of_rows(rows, routes), None

    def is_plain(self) -> bool:
        """Whether nothing is attached to the linear layers of the experts."""
        return all(type(linear) in (ColumnParallelLinear, RowParallelLinear) for linear in self._linears())

    def weights(self) -> list[torch.nn.Parameter]:
        """``fc1`` of every expert, then ``fc2`` of every expert."""
        return [linear._parameters["weight"] for linear in self._linears()]

    def _linears(self) -> list[torch.nn.Module]:
        # Megatron's modules are found by their dictionaries: `__getattr__` of hundreds of modules takes a millisecond.
        experts = [expert._modules for expert in self.local_experts]
        return [expert["linear_fc1"] for expert in experts] + [expert["linear_fc2"] for expert in experts]


class LocalDispatcher(MoETokenDispatcher):
    """Tokens stay where they are: this rank holds every expert, whole. The host waits for no number of rows."""

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[s, b, h]``, ``[T, E]`` and ``[T, E]`` -> tokens ``[T, h]`` and the shares ``[T, k]`` of their experts."""
        self._shape = tokens.shape
        # The k chosen experts of a token by rising number: a stable sort that puts True first.
        chosen = torch.sort(routing_map.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        chosen = chosen[:, : self.config.moe_router_topk]
        self._routes = routes_of_choices(chosen, routing_map.shape[1])
        return tokens.reshape(-1, tokens.shape[-1]), probs.gather(1, chosen)

    def token_dispatch(self, hidden: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing is sent."""
        return hidden, share

    def dispatch_postprocess(
        self, hidden: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, Routes, torch.Tensor]:
        """As `GroupedExperts.forward` takes them."""
        return hidden, self._routes, share

    def combine_preprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """The experts' last sum has put tokens together already."""
        return hidden

    def token_combine(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nothing is sent."""
        return hidden

    def combine_postprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T, h]`` -> ``[s, b, h]``."""
        return hidden.view(self._shape)


def use_local_dispatcher(chunk: torch.nn.Module, setting: ModelSetting, groups: Any) -> None:
    """Give layers with grouped experts the `LocalDispatcher` where this rank holds every expert, whole.

    Args:
        groups: Megatron's process groups.
    """
    if not keeps_tokens_here(setting):
        return
    for layer in chunk.modules():
        if isinstance(layer, MoELayer) and isinstance(layer.experts, GroupedExperts):
            layer.token_dispatcher = LocalDispatcher(layer.config, groups)


def experts_spec(plain: ModuleSpec, setting: ModelSetting) -> ModuleSpec:
    """Megatron's spec of a layer of experts with grouped products, where they can be had."""
    if why_not_grouped(setting) is not None:
        return plain
    experts = dataclasses.replace(plain.submodules.experts, module=GroupedExperts)
    return dataclasses.replace(plain, submodules=dataclasses.replace(plain.submodules, experts=experts))
