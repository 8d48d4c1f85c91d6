"""Which tests run: those that need a machine or a time of their own are left out, with the reason, unless asked for."""

import os
import re
from collections.abc import Iterator

import pytest

from tests.ranks import RankPool

ON_REQUEST = ("gpu", "slurm", "slow", "network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked with one of `ON_REQUEST` unless `-m` names that marker."""
    asked = set(re.findall(r"\w+", config.getoption("markexpr")))
    for item in items:
        for name in ON_REQUEST:
            if item.get_closest_marker(name) and name not in asked:
                item.add_marker(pytest.mark.skip(reason=f"marked {name}; run it with: python -m pytest -m {name}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say by which seed layouts were drawn (tests/parity/test_legal.py), if they were."""
    if seed := os.environ.get("LAYOUT_SEED"):
        terminalreporter.write_line(f"layouts drawn with LAYOUT_SEED={seed}")


@pytest.fixture(autouse=True)
def _gpu_tests_need_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("marked gpu, and PyTorch finds no CUDA device here")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four warm processes, shared by every test that needs a distributed world."""
    pool = RankPool(4)
    yield pool
    pool.close()
