"""Every row of the speed tables is a configuration that passes the checks on its number of processes."""

import re

import pytest

from benchmarks import gpu_table, many_gpus
from nemo_llm.config.checks import find_problems
from nemo_llm.config.compose.load import compose

ROWS = {**gpu_table.ROWS, **many_gpus.ROWS}
OURS = [name for name, row in ROWS.items() if "benchmarks.step_speed" in row.command]


@pytest.mark.parametrize("name", OURS)
def test_a_row_passes_the_checks(name: str) -> None:
    row = ROWS[name]
    flags = {"--warm", "--steps", "--losses"}
    words, skipped = [], False
    for word in row.command[2:]:
        if not skipped and word not in flags:
            words.append(word)
        skipped = word in flags
    cfg = compose([*words, "trainer.check_only=true"])  # as on a machine without GPUs and Transformer Engine
    assert find_problems(cfg, row.gpus) == []
    for number, thousands in re.findall(r"\b(4096|8192|\d+(?=k\b))(k?)\b", name):
        assert cfg.data.seq_length == int(number) * (1024 if thousands else 1)


def test_every_peer_is_a_row() -> None:
    assert {row.peer for row in ROWS.values() if row.peer} <= set(ROWS)
