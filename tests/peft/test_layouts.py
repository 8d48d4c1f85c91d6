"""Every kind of adapter on every layout trains as on one process: losses and gradient norms of some steps."""

from typing import Any

import pytest

from tests.parity.layouts import DENSE, MOE, Layout, model_overrides
from tests.ranks import RankPool

STEPS = 3
TOLERANCE = 2e-5
KINDS = ("lora", "dora", "ia3", "adapter", "prompt_tuning", "p_tuning")
EXPERT_KINDS = ("lora", "dora", "ia3")
# Large steps, so that B leaves zero at once and what is behind it counts.
COMMON = ("optim.lr=1e-2", "optim.sched.warmup_steps=1")
OWN = {
    **dict.fromkeys(("lora", "dora"), ("peft.rank=4",)),
    "adapter": ("peft.bottleneck_size=8",),
    **dict.fromkeys(("prompt_tuning", "p_tuning"), ("peft.num_virtual_tokens=8",)),
}
EXPERT_PARTS = "peft.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]"


def train(model: str, kinds: tuple[str, ...], overrides: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step, for each kind; runs on every rank."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    common = [*model_overrides(model), "trainer.accelerator=cpu", *COMMON, *overrides]
    runtime, rows = None, {}
    for kind in kinds:
        cfg = compose([f"peft={kind}", *common, *OWN.get(kind, ())])
        runtime = runtime or start_runtime(cfg.runtime_setting)
        run = build_training_run(cfg, runtime)
        rows[kind] = [(result.loss, result.grad_norm) for result in (train_step(run) for _ in range(STEPS))]
    return rows


def assert_close(kind: str, actual: list, expected: list) -> None:
    for step, (got, wanted) in enumerate(zip(actual, expected, strict=True), start=1):
        assert got == pytest.approx(wanted, rel=TOLERANCE), f"{kind}, step {step}"


def named(layouts: list[Layout], *names: str) -> list[Layout]:
    found = [layout for layout in layouts if layout.name in names]
    assert len(found) == len(names)
    return found


# Run on request: what they add to the others was looked at once.
SLOW = ("TP2 SP DP2, full recompute", "TP2 SP ETP1", "PP2 EP2")


def slow_if_listed(layout: Layout) -> Any:
    """The layout as a test's parameter."""
    return pytest.param(layout, marks=pytest.mark.slow) if layout.name in SLOW else layout


DENSE_LAYOUTS = named(
    DENSE,
    "TP2",
    "CP2 all-to-all",
    "PP2 VPP2",
    "TP2 SP PP2 distributed optimizer",
    "TP2 SP DP2, full recompute",
)
MOE_LAYOUTS = named(MOE, "TP2 SP", "TP2 SP EP2", "TP2 SP EP2 ETP1", "TP2 SP ETP1", "ETP2", "PP2 EP2")


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, list]:
    """Each kind on one process."""
    return ranks.run(train, 1, "gpt_tiny", KINDS, ())[0]


@pytest.fixture(scope="module")
def single_moe(ranks: RankPool) -> dict[str, list]:
    """Adapters on attention and experts on one process."""
    return ranks.run(train, 1, "moe_tiny", EXPERT_KINDS, (EXPERT_PARTS,))[0]


def test_adapters_start_as_nothing_and_then_learn(single: dict[str, list]) -> None:
    linear = ("lora", "dora", "ia3", "adapter")
    firsts = [single[kind][0][0] for kind in linear]
    assert firsts == pytest.approx([firsts[0]] * len(linear), rel=1e-6)
    assert len({round(single[kind][-1][0], 5) for kind in KINDS}) == len(KINDS)
    assert all(norm > 0 for kind in KINDS for _, norm in single[kind])


@pytest.mark.parametrize("layout", [slow_if_listed(layout) for layout in DENSE_LAYOUTS], ids=lambda layout: layout.name)
def test_layout_equals_one_process(layout: Layout, ranks: RankPool, single: dict[str, list]) -> None:
    for rows in ranks.run(train, layout.processes, "gpt_tiny", KINDS, layout.overrides):
        for kind in KINDS:
            assert_close(kind, rows[kind], single[kind])


@pytest.mark.parametrize("layout", [slow_if_listed(layout) for layout in MOE_LAYOUTS], ids=lambda layout: layout.name)
def test_expert_layout_equals_one_process(layout: Layout, ranks: RankPool, single_moe: dict[str, list]) -> None:
    for rows in ranks.run(train, layout.processes, "moe_tiny", EXPERT_KINDS, (EXPERT_PARTS, *layout.overrides)):
        for kind in EXPERT_KINDS:
            assert_close(kind, rows[kind], single_moe[kind])
