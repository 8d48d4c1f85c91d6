"""Where each rank stands in the two grids of a `ParallelLayout`, and which ranks form a group: for comparison alone."""

from collections.abc import Sequence
from math import prod

from nemo_llm.parallel.layout import ParallelLayout

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


def coordinates(layout: ParallelLayout, rank: int) -> dict[str, int]:
    """Position of `rank` on every axis of both grids: tp, cp, dp, pp, etp, ep, edp."""
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank {rank} is outside 0..{layout.world_size - 1}")
    return _decompose(layout, rank, DENSE_AXES) | _decompose(layout, rank, EXPERT_AXES)


def rank_of(layout: ParallelLayout, axes: Sequence[str], **position: int) -> int:
    """Rank at a position of the dense or of the expert grid."""
    for axis, index in position.items():
        if not 0 <= index < layout.size(axis):
            raise ValueError(f"{axis} index {index} is outside 0..{layout.size(axis) - 1}")
    strides = [prod(layout.size(axis) for axis in axes[:place]) for place in range(len(axes))]
    return sum(position.get(axis, 0) * stride for axis, stride in zip(axes, strides, strict=True))


def groups(layout: ParallelLayout, *axes: str) -> tuple[tuple[int, ...], ...]:
    """All groups of ranks that differ on `axes` alone, ranks ascending within a group, groups by first rank.

    ``groups(layout, "dp", "cp")`` are the ranks that reduce a dense gradient together, ``"edp"`` an expert's.

    Raises:
        ValueError: the axes are not all of one grid.
    """
    grid = next((names for names in (DENSE_AXES, EXPERT_AXES) if set(axes) <= set(names)), None)
    if grid is None:
        raise ValueError(f"axes {axes} are not all of {DENSE_AXES} nor all of {EXPERT_AXES}")
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        position = _decompose(layout, rank, grid)
        members.setdefault(tuple(position[axis] for axis in grid if axis not in axes), []).append(rank)
    return tuple(sorted(tuple(group) for group in members.values()))


def _decompose(layout: ParallelLayout, rank: int, axes: Sequence[str]) -> dict[str, int]:
    position = {}
    for axis in axes:
        rank, position[axis] = divmod(rank, layout.size(axis))
    return position
