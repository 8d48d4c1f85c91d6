"""The learning-rate curves: end points, continuity, monotone parts, and known values."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_llm.config import SchedConfig
from nemo_llm.config.sections.optim import learning_rate

STYLES = ["linear", "cosine", "minus_sqrt", "exponential"]


def sched(name="cosine", warmup=10, decay=100, min_lr=1e-5, wsd=30, style="linear"):
    return SchedConfig(
        name=name,
        warmup_steps=warmup,
        decay_steps=decay,
        min_lr=min_lr,
        wsd_decay_steps=wsd if name == "wsd" else None,
        wsd_decay_style=style,
    )


@st.composite
def schedules(draw):
    warmup = draw(st.integers(0, 200))
    wsd = draw(st.integers(1, 300))
    return sched(
        name=draw(st.sampled_from(["cosine", "wsd", "linear", "constant"])),
        warmup=warmup,
        decay=warmup + wsd + draw(st.integers(0, 300)),
        min_lr=draw(st.floats(0, 1e-4)),
        wsd=wsd,
        style=draw(st.sampled_from(STYLES)),
    )


PEAK = 1e-3


@given(schedules())
def test_rates_stay_in_bounds_rise_in_warmup_and_never_rise_after_it(config):
    rates = [learning_rate(step, PEAK, config) for step in range(1, config.decay_steps + 20)]
    warmup = rates[: config.warmup_steps]
    rest = rates[max(config.warmup_steps - 1, 0) :]
    assert all(0 < rate <= PEAK for rate in warmup)
    assert warmup == sorted(warmup)
    floor = PEAK if config.name == "constant" else config.min_lr
    assert all(floor <= rate <= PEAK * (1 + 1e-12) for rate in rest)
    assert all(later <= earlier for earlier, later in pairwise(rest))


@given(schedules())
def test_end_points_are_exact(config):
    if config.warmup_steps and config.warmup_steps < config.decay_steps:
        assert learning_rate(config.warmup_steps, PEAK, config) == pytest.approx(PEAK, rel=1e-12)
    last = PEAK if config.name == "constant" else config.min_lr
    assert learning_rate(config.decay_steps, PEAK, config) == last
    assert learning_rate(10 * config.decay_steps, PEAK, config) == last


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1000])
def test_curves_have_no_jump(name, warmup):
    config = sched(name, warmup=warmup, decay=10_000)
    steepest = PEAK * max(1 / 1000, math.pi / 2 / 9000)
    rates = [learning_rate(step, PEAK, config) for step in range(max(1, warmup - 500), 10_500)]
    assert max(abs(a - b) for a, b in pairwise(rates)) <= steepest * 1.001


@pytest.mark.parametrize("style", STYLES)
def test_wsd_is_flat_then_decays_without_a_jump(style):
    config = sched("wsd", warmup=100, decay=10_000, wsd=2000, style=style)
    (flat,) = {learning_rate(step, PEAK, config) for step in range(101, 8001)}
    assert flat == pytest.approx(PEAK, rel=1e-12)
    rates = [learning_rate(step, PEAK, config) for step in range(7990, 10_010)]
    # 1 - sqrt starts with an infinite slope: its first step is sqrt(1/2000) of the height.
    assert max(abs(a - b) for a, b in pairwise(rates)) <= PEAK * math.sqrt(1 / 2000)
    assert rates[11] < PEAK


@pytest.mark.parametrize(
    ("style", "middle"), [("linear", 0.5), ("cosine", 0.5), ("minus_sqrt", 1 - 0.5**0.5), ("exponential", 2**0.5 - 1)]
)
def test_value_in_the_middle_of_the_decay(style, middle):
    config = sched("wsd", warmup=0, decay=100, min_lr=0.0, wsd=40, style=style)
    assert learning_rate(80, 1.0, config) == pytest.approx(middle)


def test_first_update_is_not_wasted_and_warmup_is_linear():
    config = sched("cosine", warmup=4)
    assert [learning_rate(step, 1.0, config) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(1, 1.0, sched("constant", warmup=0)) == 1.0


def test_cosine_counts_warmup_in_its_length():
    config = sched("cosine", warmup=20, decay=100, min_lr=0.1)
    assert learning_rate(60, 1.0, config) == pytest.approx(0.1 + 0.5 * 0.9)


def test_wsd_without_a_decay_length_is_refused():
    config = SchedConfig(
        name="wsd", warmup_steps=0, decay_steps=10, min_lr=0.0, wsd_decay_steps=None, wsd_decay_style="linear"
    )
    with pytest.raises(ValueError, match="wsd_decay_steps = None"):
        learning_rate(5, 1.0, config)
