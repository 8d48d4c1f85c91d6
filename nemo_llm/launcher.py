"""What the launcher says of this process, known before any process group exists."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class ProcessPlace:
    """Where this process stands in the job, as the launcher said it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str

    @property
    def num_nodes(self) -> int:
        return max(1, self.world_size // self.local_world_size)

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size


def find_process_place(environ: Mapping[str, str] | None = None) -> ProcessPlace:
    """Read rank and world size from torchrun's variables, else from Slurm's, else take a single process."""
    environ = os.environ if environ is None else environ
    numbers = {name: int(environ[name]) for name in _NUMBERS if environ.get(name, "").isdecimal()}
    if "RANK" in numbers and numbers.get("WORLD_SIZE"):
        rank, world = numbers["RANK"], numbers["WORLD_SIZE"]
        local = numbers.get("LOCAL_RANK", rank), numbers.get("LOCAL_WORLD_SIZE", world)
        return ProcessPlace(rank, world, *local, "torchrun")
    # SLURM_PROCID alone is also set in a batch shell and under salloc, and SLURM_NTASKS in a batch script that has
    # started no step; srun's step sets SLURM_STEP_NUM_TASKS too.
    if "SLURM_PROCID" in numbers and (world := numbers.get("SLURM_STEP_NUM_TASKS", 0)) > 0:
        nodes = numbers.get("SLURM_STEP_NUM_NODES", 1)
        local = numbers.get("SLURM_LOCALID", 0), world // nodes
        return ProcessPlace(numbers["SLURM_PROCID"], world, *local, "slurm")
    return ProcessPlace(0, 1, 0, 1, "single")
