"""Layouts that the checks allow compute what one process computes: some drawn anew in each run, all of them on request.

The seed stands at the end of the run (`tests/conftest.py`) and in every failure; ``LAYOUT_SEED=n`` repeats it.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.parity.layouts import Layout
from tests.parity.legal import (
    LOSS_TOLERANCE,
    MODELS,
    NORM_TOLERANCE,
    compare,
    drawing_seed,
    drawn_layouts,
    legal_layouts,
)
from tests.ranks import RankPool
from tests.training.test_resume import BEFORE, _train


def assert_equal_to_one_process(pool: RankPool, model: str, layouts: Sequence[Layout]) -> None:
    """All of them, so that one failure does not hide the others."""
    wrong = [
        f"{layout.name} ({layout.processes} processes): loss {loss:.1e}, gradient norm {norm:.1e}"
        for layout, loss, norm in compare(pool, model, layouts)
        if not (loss < LOSS_TOLERANCE and norm < NORM_TOLERANCE)
    ]
    assert not wrong, f"LAYOUT_SEED={drawing_seed()}, {model}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("model", list(MODELS))
def test_drawn_layouts_equal_one_process(model: str, ranks: RankPool) -> None:
    assert_equal_to_one_process(ranks, model, drawn_layouts(model, 4))


@pytest.mark.slow
@pytest.mark.parametrize("model", list(MODELS))
def test_every_legal_layout_equals_one_process(model: str, ranks: RankPool) -> None:
    assert_equal_to_one_process(ranks, model, legal_layouts(model))


def test_a_drawn_layout_goes_on_in_another(ranks: RankPool, tmp_path: Path) -> None:
    name, extra = MODELS["experts"]
    first, second = drawn_layouts("experts", 6)[-2:]  # others than those that are compared above
    where = f"LAYOUT_SEED={drawing_seed()}: from {first.name} to {second.name}"
    saved = (*extra, *first.overrides)
    whole = ranks.run(_train, first.processes, name, saved, str(tmp_path), BEFORE, False)[0]
    resumed = ranks.run(_train, second.processes, name, (*extra, *second.overrides), str(tmp_path), None, True)[0]
    for wanted, found in zip(whole[BEFORE:], resumed, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5), where


def test_the_axes_reach_every_kind_of_layout() -> None:
    """The table is asked of the checks: an axis that they refuse altogether would leave it without a word."""
    for model in MODELS:
        names = " ".join(layout.name for layout in legal_layouts(model))
        axes = ["TP2", "TP4", "SP", "PP2", "PP4", "VPP2", "CP2 a2a", "CP4 all_gather", "DP4", "distributed optimizer"]
        expert_axes = ["EP2", "EP4", "ETP1", "ETP2", "ETP4"]
        assert [axis for axis in axes + expert_axes * (model != "dense") if axis not in names] == [], model
