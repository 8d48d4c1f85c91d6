"""The processes of a job: where this one stands, as its launcher says it, and an end that no worker outlives.

The one reader of torchrun's and Slurm's variables.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessPlace:
    """This process' numbers; of ``single`` they are those of a process alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "single"

    @property
    def num_nodes(self) -> int:
        return max(1, self.world_size // self.local_world_size)


def find_process_place(environ: Mapping[str, str] | None = None) -> ProcessPlace:
    """Read rank and world size from torchrun's variables, else from Slurm's, else take a single process.

    Known before any process group exists, so that configuration errors can be printed once.
    """
    environ = os.environ if environ is None else environ

    def number(name: str, default: int) -> int:
        return int(environ[name]) if environ.get(name, "").isdecimal() else default

    rank, world = number("RANK", -1), number("WORLD_SIZE", 0)
    if rank >= 0 and world > 0:
        place = number("LOCAL_RANK", rank), number("LOCAL_WORLD_SIZE", world)
        return ProcessPlace(rank, world, *place, "torchrun")
    # SLURM_PROCID and SLURM_NTASKS are also set in a batch shell and under salloc; srun's step alone sets this one.
    rank, world = number("SLURM_PROCID", -1), number("SLURM_STEP_NUM_TASKS", 0)
    if rank >= 0 and world > 0:
        place = number("SLURM_LOCALID", rank), world // number("SLURM_STEP_NUM_NODES", 1)
        return ProcessPlace(rank, world, *place, "slurm")
    return ProcessPlace()


def end_with(parent: int) -> None:
    """End this process soon after its parent has ended, however that ended; runs in a thread."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
