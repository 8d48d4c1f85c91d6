"""Who is first, and what the launchers say."""

import pytest

from nemo_llm.log import is_first_rank, launched_rank, launched_world_size


@pytest.mark.parametrize(
    ("environ", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 3, 8),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16"}, 5, 16),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16"}, 1, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, 0, 1),
        ({"RANK": "", "WORLD_SIZE": ""}, 0, 1),
    ],
)
def test_launcher_variables(environ: dict[str, str], rank: int, world_size: int) -> None:
    assert launched_rank(environ) == rank
    assert launched_world_size(environ) == world_size
    assert is_first_rank(environ) == (rank == 0)
