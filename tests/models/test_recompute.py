"""Every setting of recomputation that is accepted runs, calls something again and gives the same loss and norm."""

import pytest

from tests.ranks import RankPool


def _outcomes(models: tuple[str, ...]) -> dict[str, str | None]:
    from benchmarks.recompute import measure

    return {f"{outcome.row.model}, {outcome.row.setting}": outcome.error for outcome in measure(False, models)}


def _check(ranks: RankPool, models: tuple[str, ...]) -> None:
    (errors,) = ranks.run(_outcomes, 1, models)
    assert {name: error for name, error in errors.items() if error is not None} == {}
    assert len(errors) > 7 * max(len(models), 1)


def test_settings_of_a_dense_model_and_of_experts_with_latent_attention(ranks: RankPool) -> None:
    _check(ranks, ("dense", "latent attention, experts"))


@pytest.mark.slow
def test_every_setting_of_every_model(ranks: RankPool) -> None:
    _check(ranks, ())
