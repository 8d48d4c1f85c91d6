"""The estimate beside GPUs: every measured row of benchmarks/memory_rows.py, and the table in the documentation."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.memory_rows import GPT2_TOKENS, ROWS, configuration, plan, table
from nemo_llm.config import RunConfig
from nemo_llm.config.checks import find_problems
from nemo_llm.training.check_only import report

MEASURED = [name for name, row in ROWS.items() if row.gib is not None]
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "planner.md"


@cache
def composed(name: str) -> RunConfig:
    return configuration(ROWS[name])


@pytest.mark.parametrize("name", MEASURED)
def test_estimate_is_what_was_measured(name: str) -> None:
    row, cfg = ROWS[name], composed(name)
    assert row.date, "a figure without its date"
    assert len(row.commit) >= 7, "a figure without its commit"
    limit = 0.06 if cfg.parallelism.expert_model_parallel_size > 1 else 0.04
    assert plan(row, cfg).as_measured == pytest.approx(row.gib, rel=limit)


@pytest.mark.parametrize("name", MEASURED)
def test_what_ran_is_not_refused_on_its_card(name: str) -> None:
    text = report(composed(name), ROWS[name].gpus, GPT2_TOKENS)
    assert f"GiB of {ROWS[name].card.upper()}" in text
    assert "may not fit" not in text


def test_most_rows_are_within_one_percent() -> None:
    errors = [abs(plan(ROWS[name], composed(name)).as_measured / ROWS[name].gib - 1) for name in MEASURED]
    assert len(errors) >= 40
    assert sum(errors) / len(errors) < 0.005
    assert sum(error <= 0.01 for error in errors) >= 0.9 * len(errors)


@pytest.mark.parametrize("name", list(ROWS))
def test_every_row_passes_the_checks(name: str) -> None:
    cfg = composed(name)
    imagined = replace(cfg, trainer=replace(cfg.trainer, check_only=True))  # as on a machine without Transformer Engine
    assert not find_problems(imagined, ROWS[name].gpus)


def test_documentation_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [line for line in table().splitlines() if line not in page]
    assert not missing, "python -m benchmarks.memory_rows --table prints the rows of docs/planner.md"
