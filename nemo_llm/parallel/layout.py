"""Rank arithmetic of a parallel layout, in Megatron's default order tp-cp-ep-dp-pp; pure Python, no torch.

Two grids cover the same ranks. The dense grid is TP x CP x DP x PP, the first varying fastest; the expert grid is
ETP x EP x EDP x PP. Experts are carved out of the dense ranks (TP x CP x DP = ETP x EP x EDP), so expert parallelism
never multiplies the number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from nemo_llm.config.sections.parallelism import ParallelismConfig

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Sizes of every parallel axis over `world_size` processes.

    Attributes:
        tp: tensor; cp: context; pp: pipeline; ep: expert; etp: tensor inside an expert.
        vp: model chunks per pipeline stage (1 without interleaving).

    Raises:
        ValueError: `world_size` is not a multiple of what the dense or the expert grid needs.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for axis in ("world_size", "tp", "pp", "vp", "cp", "ep", "etp"):
            if (size := getattr(self, axis)) < 1:
                raise ValueError(f"{axis} = {size}: must be at least 1")
        if self.world_size % (self.tp * self.cp * self.pp):
            raise ValueError(
                f"world size {self.world_size} is not a multiple of tp x cp x pp = {self.tp * self.cp * self.pp}"
            )
        if self.world_size % (self.etp * self.ep * self.pp):
            raise ValueError(
                f"world size {self.world_size} is not a multiple of etp x ep x pp = {self.etp * self.ep * self.pp}"
            )

    @classmethod
    def from_config(cls, parallelism: ParallelismConfig, world_size: int) -> "ParallelLayout":
        """Layout that the `parallelism` section describes over `world_size` processes."""
        return cls(
            world_size=world_size,
            tp=parallelism.tensor_model_parallel_size,
            pp=parallelism.pipeline_model_parallel_size,
            vp=parallelism.virtual_pipeline_model_parallel_size or 1,
            cp=parallelism.context_parallel_size,
            ep=parallelism.expert_model_parallel_size,
            etp=parallelism.expert_tp_size,
        )

    @property
    def dp(self) -> int:
        """Data-parallel size of the dense grid (copies of the dense model)."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the expert grid (copies of each expert)."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches that each pipeline runs in one step.

        Raises:
            ValueError: the global batch does not divide evenly.
        """
        count, rest = divmod(global_batch_size, micro_batch_size * self.dp)
        if rest or not count:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of "
                f"micro_batch_size {micro_batch_size} x dp {self.dp}"
            )
        return count

    def size(self, axis: str) -> int:
        """Size of one axis: tp, cp, dp, pp, etp, ep, edp or vp."""
        return int(getattr(self, axis))

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

    def describe(self) -> str:
        """The layout in one line, axes of size one left out."""
        axes = [f"{axis.upper()} {self.size(axis)}" for axis in ("tp", "pp", "vp", "cp", "ep") if self.size(axis) > 1]
        if self.ep > 1 or self.etp != self.tp:
            axes += [f"ETP {self.etp}", f"EDP {self.edp}"]
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{processes}: " + " x ".join([*axes, f"DP {self.dp}"])

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
