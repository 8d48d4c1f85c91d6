"""Rank arithmetic of a parallel layout, in Megatron's default order tp-cp-ep-dp-pp; pure Python, no torch.

Two grids cover the same ranks. The dense grid is TP x CP x DP x PP, the first varying fastest; the expert grid is
ETP x EP x EDP x PP. Experts are carved out of the dense ranks (TP x CP x DP = ETP x EP x EDP), so expert parallelism
never multiplies the number of processes.
"""

from dataclasses import dataclass

from nemo_llm.config.sections.parallelism import ParallelismConfig


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

    def describe(self) -> str:
        """The layout in one line, axes of size one left out."""
        axes = [f"{axis.upper()} {self.size(axis)}" for axis in ("tp", "pp", "vp", "cp", "ep") if self.size(axis) > 1]
        if self.ep > 1 or self.etp != self.tp:
            axes += [f"ETP {self.etp}", f"EDP {self.edp}"]
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{processes}: " + " x ".join([*axes, f"DP {self.dp}"])
