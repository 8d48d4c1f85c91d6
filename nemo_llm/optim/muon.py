"""Muon: orthogonalised momentum for the matrices of the layers, AdamW for all else, under any layout.

Momentum is kept where Megatron's optimizer keeps its fp32 weights: whole, or a range of each flattened weight on each
data-parallel rank. A step sends the pieces of every matrix to one owner among the ranks that share it (tensor and data
parallel), which puts the whole matrix together, takes its nearest semi-orthogonal matrix, and sends the pieces back:
two all-to-alls in the dtype of the products. No rank does another's work twice, and the whole matrix is the same in
every layout. Megatron-Core 0.16.1 has a Muon of its own, which needs the package ``emerging_optimizers`` and cannot be
used with the distributed optimizer.

Sources: Jordan et al., *Muon* (2024), for the iteration and its coefficients; Liu et al., arXiv:2502.16982, for the
scale, with which AdamW's learning rate and weight decay can be kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_llm.config.sections.optim import MuonConfig
from nemo_llm.optim.adamw import FusedAdamW

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_RMS_OF_ADAMW = 0.2
# Elements of all matrices that are under way at once: bounds the memory of a step.
_ROUND_ELEMENTS = 1 << 28
_BATCH_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Matrix:
    """A weight of the layers: [rows, columns] on each tensor-parallel rank.

    Attributes:
        split: the dimension that tensor parallelism splits, or None where each rank has the whole.
        inner: sizes of the leading axes that ``rows`` stands for, of which the second holds what is orthogonalised
            apart: (1, 1, rows), (1, 2, rows / 2) for gate and up, (groups, R + 2, head size) for queries of R heads,
            keys and values.
    """

    rows: int
    columns: int
    split: int | None
    inner: tuple[int, int, int]

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of ``whole`` [tp, rows, columns], each [..., columns or tp * columns] and one matrix for itself."""
        if self.split == 1:
            return [whole.permute(1, 0, 2)]
        _, kinds, size = self.inner
        apart = whole.view(-1, kinds, size, self.columns)
        if kinds <= 2:
            return [apart[:, kind] for kind in range(kinds)]
        return [apart[:, : kinds - 2], apart[:, kinds - 2], apart[:, kinds - 1]]


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, start + count)`` of one rank's flattened part of a matrix."""

    matrix: int
    tp_rank: int
    start: int
    count: int


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Matrices [n, r, c] -> their nearest semi-orthogonal ones, singular values within about 0.3 of 1.

    Newton-Schulz iteration of the fifth degree; products in the dtype of ``x``.
    """
    a, b, c = _COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = torch.linalg.matrix_norm(x, dtype=torch.promote_types(x.dtype, torch.float32), keepdim=True)
    x = x / (norm + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@dataclass(frozen=True)
class GroupPlace:
    """The ranks that share matrices, this rank's place among the tensor-parallel ones, and the products' dtype."""

    group: dist.ProcessGroup
    tp_rank: int
    tp_size: int
    dtype: torch.dtype


class Muon(FusedAdamW):
    """AdamW whose matrices, once `connect` has named them, are updated by Muon."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._pieces: dict[Tensor, Piece] = {}

    def connect(
        self, rule: MuonConfig, matrices: Sequence[Matrix], pieces: dict[Tensor, Piece], place: GroupPlace
    ) -> None:
        """Say which parameters are pieces of matrices; a collective of the group.

        Args:
            rule: momentum and number of iterations.
            matrices: all that the ranks of the group share, in the same order on each.
            pieces: by parameter of this optimizer.
            place: this rank's in the group.
        """
        self._rule, self._pieces = rule, pieces
        self._exchange = _Exchange(matrices, list(pieces.values()), place)

    def moment_names(self, parameter: Tensor, /) -> tuple[str, ...]:
        """Matrices have the first moment alone."""
        return ("exp_avg",) if parameter in self._pieces else super().moment_names(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient; a collective of the group."""
        super().step(closure)
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        parameters = list(self._pieces)

        def momentum(number: int) -> Tensor:
            return self._momentum(parameters[number])

        for number, update in self._exchange.orthogonalized(momentum, self._rule.newton_schulz_steps):
            parameter = parameters[number]
            group = groups[parameter]
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            parameter.view(-1).add_(update, alpha=-group["lr"])
        self.copy_to_halves(parameters)

    def _by_adamw(self, parameter: Tensor, /) -> bool:
        return parameter not in self._pieces

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's look ahead along the moving average of gradients, flat."""
        gradient, average = parameter.grad, self.moments(parameter)["exp_avg"]
        assert gradient is not None, "a weight of the layers has no gradient"
        if self.gradient_factor != 1.0:
            gradient.mul_(self.gradient_factor)
        average.lerp_(gradient, 1.0 - self._rule.momentum)
        return gradient.lerp(average, self._rule.momentum).view(-1)


class _Exchange:
    """Who owns which matrix, and the way of every piece there and back."""

    def __init__(self, matrices: Sequence[Matrix], own: list[Piece], place: GroupPlace) -> None:
        self.matrices, self.own, self.place = matrices, own, place
        self.rank, size = dist.get_rank(place.group), dist.get_world_size(place.group)
        self.pieces: list[list[Piece]] = [[] for _ in range(size)]
        dist.all_gather_object(self.pieces, own, group=place.group)
        self.owners = _assign_owners(matrices, size)
        self.rounds = _rounds(matrices, place.tp_size)

    def orthogonalized(self, update: Callable[[int], Tensor], steps: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the piece, its part of the scaled result, flat) for each of this rank's pieces.

        Args:
            update: what is orthogonalised, flat, of the piece with this number; asked for once a piece.
        """
        for chosen in self.rounds:
            wholes = self._collect(chosen, update)
            for shape, parts in _by_shape(self.matrices, wholes):
                _orthogonalize_in_place(parts, shape, steps)
            yield from self._give_back(chosen, wholes)

    def _collect(self, chosen: set[int], update: Callable[[int], Tensor]) -> dict[int, Tensor]:
        """The whole matrices of this round that this rank owns, [tp, rows, columns] by number."""
        updates = {
            number: update(number).to(self.place.dtype)
            for number, piece in enumerate(self.own)
            if piece.matrix in chosen
        }
        owners = range(len(self.pieces))
        sent = [[updates[number] for number, _ in self._from(self.own, chosen, owner, once=True)] for owner in owners]
        sizes = [sum(p.count for _, p in self._from(pieces, chosen, self.rank, once=True)) for pieces in self.pieces]
        received = self._all_to_all(sent, sizes)
        wholes = {}
        for number in sorted(chosen):
            if self.owners[number] == self.rank:
                matrix = self.matrices[number]
                parts = 1 if matrix.split is None else self.place.tp_size
                wholes[number] = received.new_empty(parts, matrix.rows, matrix.columns)
        at = 0
        for pieces in self.pieces:
            for _, piece in self._from(pieces, chosen, self.rank, once=True):
                _range_of(wholes, piece).copy_(received[at : at + piece.count])
                at += piece.count
        return wholes

    def _give_back(self, chosen: set[int], wholes: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        sent = [
            [_range_of(wholes, piece) for _, piece in self._from(pieces, chosen, self.rank, once=False)]
            for pieces in self.pieces
        ]
        mine = [list(self._from(self.own, chosen, owner, once=False)) for owner in range(len(self.pieces))]
        received = self._all_to_all(sent, [sum(piece.count for _, piece in pieces) for pieces in mine])
        at = 0
        for number, piece in (entry for pieces in mine for entry in pieces):
            yield number, received[at : at + piece.count]
            at += piece.count

    def _from(self, pieces: list[Piece], chosen: set[int], owner: int, once: bool) -> Iterator[tuple[int, Piece]]:
        """Pieces (with their numbers) of this round's matrices of ``owner``; ``once``: of copies the first alone."""
        for number, piece in enumerate(pieces):
            if piece.matrix in chosen and self.owners[piece.matrix] == owner:
                copy = self.matrices[piece.matrix].split is None and piece.tp_rank > 0
                if not (once and copy):
                    yield number, piece

    def _all_to_all(self, sent: list[list[Tensor]], sizes: list[int]) -> Tensor:
        flat = [part for parts in sent for part in parts]
        joined = torch.cat(flat) if flat else torch.empty(0, dtype=self.place.dtype, device=self._device())
        if len(sent) == 1:
            return joined
        received = joined.new_empty(sum(sizes))
        lengths = [sum(part.numel() for part in parts) for parts in sent]
        dist.all_to_all_single(received, joined, sizes, lengths, group=self.place.group)
        return received

    def _device(self) -> torch.device:
        backend = dist.get_backend(self.place.group)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _assign_owners(matrices: Sequence[Matrix], size: int) -> list[int]:
    """An owner for each matrix: the costliest first, each to the rank with the least work; the same on every rank."""
    load, owners = [0.0] * size, [0] * len(matrices)
    cost = [m.rows * m.columns * min(m.rows, m.columns) for m in matrices]
    for number in sorted(range(len(matrices)), key=lambda n: (-cost[n], n)):
        owners[number] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owners[number]] += cost[number]
    return owners


def _rounds(matrices: Sequence[Matrix], tp_size: int) -> list[set[int]]:
    rounds: list[set[int]] = []
    filled = _ROUND_ELEMENTS
    for number, matrix in enumerate(matrices):
        if filled >= _ROUND_ELEMENTS:
            rounds.append(set())
            filled = 0
        rounds[-1].add(number)
        filled += matrix.rows * matrix.columns * (1 if matrix.split is None else tp_size)
    return rounds


def _range_of(wholes: dict[int, Tensor], piece: Piece) -> Tensor:
    """The view that this piece is of its whole matrix; copies on other tensor-parallel ranks are the first one's."""
    whole = wholes[piece.matrix]
    return whole[piece.tp_rank % len(whole)].view(-1)[piece.start : piece.start + piece.count]


def _by_shape(matrices: Sequence[Matrix], wholes: dict[int, Tensor]) -> Iterable[tuple[tuple[int, int], list[Tensor]]]:
    """The parts of all matrices, those of one shape together."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    for number, whole in wholes.items():
        for part in matrices[number].parts(whole):
            columns = part.shape[-1] * (part.shape[-2] if matrices[number].split == 1 else 1)
            found.setdefault((part.numel() // columns, columns), []).append(part)
    return sorted(found.items(), key=lambda entry: entry[0])


def _orthogonalize_in_place(parts: list[Tensor], shape: tuple[int, int], steps: int) -> None:
    """Several at once, since small ones fill a GPU only side by side."""
    together = max(1, _BATCH_ELEMENTS // math.prod(shape))
    for start in range(0, len(parts), together):
        batch = parts[start : start + together]
        result = orthogonalize(torch.stack([part.reshape(shape) for part in batch]), steps)
        result = result * (_RMS_OF_ADAMW * math.sqrt(max(shape)))
        for part, one in zip(batch, result, strict=True):
            part.copy_(one.reshape(part.shape))
