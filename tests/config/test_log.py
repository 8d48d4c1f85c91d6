"""Who is first, and what the launchers say."""

import pytest

from nemo_llm.log import is_first_rank
from nemo_llm.processes import ProcessPlace, find_process_place


@pytest.mark.parametrize(
    ("environ", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 3, 8),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16"}, 5, 16),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16"}, 1, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, 0, 1),
        ({"RANK": "", "WORLD_SIZE": ""}, 0, 1),
        # Half of a launcher's variables is no launcher: the runtime starts one process, and that one speaks.
        ({"RANK": "3"}, 0, 1),
        ({"WORLD_SIZE": "8"}, 0, 1),
        ({"SLURM_PROCID": "3"}, 0, 1),
    ],
)
def test_launcher_variables(environ: dict[str, str], rank: int, world_size: int) -> None:
    place = find_process_place(environ)
    assert (place.rank, place.world_size) == (rank, world_size)
    assert is_first_rank(environ) == (rank == 0)


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (
            {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
            ProcessPlace(9, 16, 1, 8, "torchrun"),
        ),
        ({"RANK": "3", "WORLD_SIZE": "4"}, ProcessPlace(3, 4, 3, 4, "torchrun")),
        (
            {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"},
            ProcessPlace(9, 16, 1, 8, "slurm"),
        ),
        ({}, ProcessPlace(0, 1, 0, 1, "single")),
    ],
)
def test_place_in_the_job(environ: dict[str, str], place: ProcessPlace) -> None:
    assert find_process_place(environ) == place
    assert place.num_nodes == (2 if place.world_size == 16 else 1)
