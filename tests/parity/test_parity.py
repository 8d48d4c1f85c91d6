"""Every layout computes what one process computes: loss and gradient norm of ten steps, dense and with experts."""

import json
from pathlib import Path

import pytest

from tests.parity.layouts import DENSE, MOE, Layout, train_losses
from tests.ranks import RankPool

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = ("gpt_tiny", "moe_tiny")
FP32_TOLERANCE = 1e-5
# bf16 keeps eight bits: sums in another order differ in the third digit of a gradient, and Adam carries that on.
BF16_LOSS_TOLERANCE, BF16_NORM_TOLERANCE = 2e-3, 5e-2


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, list]:
    """Losses and gradient norms of both models on one process."""
    return {model: ranks.run(train_losses, 1, model, ())[0] for model in MODELS}


def _assert_close(actual: list, expected: list, loss_tolerance: float, norm_tolerance: float) -> None:
    for step, ((loss, norm), (wanted_loss, wanted_norm)) in enumerate(zip(actual, expected, strict=True), start=1):
        assert loss == pytest.approx(wanted_loss, rel=loss_tolerance), f"loss of step {step}"
        assert norm == pytest.approx(wanted_norm, rel=norm_tolerance), f"gradient norm of step {step}"


@pytest.mark.parametrize("model", MODELS)
def test_one_process_gives_the_golden_losses(model: str, single: dict) -> None:
    golden = json.loads((GOLDEN / f"{model}_fp32.json").read_text())
    _assert_close(single[model], golden["steps"], FP32_TOLERANCE, FP32_TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_repeats_itself_bit_by_bit(model: str, single: dict, ranks: RankPool) -> None:
    assert ranks.run(train_losses, 1, model, ())[0] == single[model]


@pytest.mark.parametrize("layout", DENSE, ids=lambda layout: layout.name)
def test_dense_layout_equals_one_process(layout: Layout, ranks: RankPool, single: dict) -> None:
    for losses in ranks.run(train_losses, layout.processes, "gpt_tiny", layout.overrides):
        _assert_close(losses, single["gpt_tiny"], FP32_TOLERANCE, FP32_TOLERANCE)


@pytest.mark.parametrize("layout", MOE, ids=lambda layout: layout.name)
def test_expert_layout_equals_one_process(layout: Layout, ranks: RankPool, single: dict) -> None:
    for losses in ranks.run(train_losses, layout.processes, "moe_tiny", layout.overrides):
        _assert_close(losses, single["moe_tiny"], FP32_TOLERANCE, FP32_TOLERANCE)


@pytest.mark.parametrize("overrides", [(), ("parallelism.expert_model_parallel_size=2",)], ids=["here", "EP2"])
def test_experts_in_one_product_equal_experts_one_after_another(
    overrides: tuple[str, ...], ranks: RankPool, single: dict
) -> None:
    one_by_one = (*overrides, "model.moe.moe_grouped_gemm=false")
    for losses in ranks.run(train_losses, 1 + len(overrides), "moe_tiny", one_by_one):
        _assert_close(losses, single["moe_tiny"], FP32_TOLERANCE, FP32_TOLERANCE)


@pytest.mark.parametrize("layout", [DENSE[1], DENSE[4], DENSE[5]], ids=lambda layout: layout.name)
def test_bf16_layout_stays_near_one_process(layout: Layout, ranks: RankPool) -> None:
    bf16 = ("precision=bf16",)
    one = ranks.run(train_losses, 1, "gpt_tiny", (), bf16)[0]
    for losses in ranks.run(train_losses, layout.processes, "gpt_tiny", layout.overrides, bf16):
        _assert_close(losses, one, BF16_LOSS_TOLERANCE, BF16_NORM_TOLERANCE)
