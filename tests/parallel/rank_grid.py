"""Which rank stands where in a layout, in Megatron's default order tp-cp-ep-dp-pp."""

from collections.abc import Sequence
from math import prod

from nemo_llm.parallel.layout import ParallelLayout

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


class RankGrid(ParallelLayout):
    """A layout that also tells ranks and groups from its sizes."""

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of `rank` on every axis of both grids: tp, cp, dp, pp, etp, ep, edp."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}")
        return self._decompose(rank, DENSE_AXES) | self._decompose(rank, EXPERT_AXES)

    def rank_of(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Rank at a position of the dense grid."""
        return self._compose({"tp": tp, "cp": cp, "dp": dp, "pp": pp}, DENSE_AXES)

    def expert_rank_of(self, *, etp: int = 0, ep: int = 0, edp: int = 0, pp: int = 0) -> int:
        """Rank at a position of the expert grid."""
        return self._compose({"etp": etp, "ep": ep, "edp": edp, "pp": pp}, EXPERT_AXES)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that differ on `axes` alone, ranks ascending within a group, groups by first rank.

        ``groups("dp", "cp")`` are the ranks that reduce a dense gradient together, ``groups("edp")`` an expert's.

        Raises:
            ValueError: the axes are not all of one grid.
        """
        grid = next((names for names in (DENSE_AXES, EXPERT_AXES) if set(axes) <= set(names)), None)
        if grid is None:
            raise ValueError(f"axes {axes} are not all of {DENSE_AXES} nor all of {EXPERT_AXES}")
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self._decompose(rank, grid)
            members.setdefault(tuple(position[axis] for axis in grid if axis not in axes), []).append(rank)
        return tuple(sorted(tuple(group) for group in members.values()))

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group of `groups` that `rank` is in."""
        return next(group for group in self.groups(*axes) if rank in group)

    def _decompose(self, rank: int, axes: Sequence[str]) -> dict[str, int]:
        position = {}
        for axis in axes:
            rank, position[axis] = divmod(rank, self.size(axis))
        return position

    def _compose(self, position: dict[str, int], axes: Sequence[str]) -> int:
        for axis, index in position.items():
            if not 0 <= index < self.size(axis):
                raise ValueError(f"{axis} index {index} is outside 0..{self.size(axis) - 1}")
        strides = [prod(self.size(axis) for axis in axes[:place]) for place in range(len(axes))]
        return sum(position[axis] * stride for axis, stride in zip(axes, strides, strict=True))
