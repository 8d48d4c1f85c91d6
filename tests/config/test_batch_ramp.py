"""The batch-size ramp against a step-by-step simulation of Megatron's rule, and its checks."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_llm.config import RampupBatchSize
from nemo_llm.config.checks.recipe import check_batch_ramp
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.batch_ramp import build_batch_ramp
from nemo_llm.errors import InputError


def ramp(start, increment, samples):
    return RampupBatchSize(start_global_batch_size=start, increment=increment, ramp_samples=samples)


def megatron_sizes(global_batch_size, rampup, num_steps):
    """Sizes step by step, by the rule of Megatron's calculator, in exact fractions."""
    increments = (global_batch_size - rampup.start_global_batch_size) // rampup.increment
    consumed = 0
    for _ in range(num_steps):
        if consumed > rampup.ramp_samples or increments == 0:
            size = global_batch_size
        else:
            passed = int(consumed / Fraction(rampup.ramp_samples, increments))
            size = rampup.start_global_batch_size + passed * rampup.increment
        yield size
        consumed += size


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 12), st.integers(1, 3000))
def test_every_step_has_the_size_and_samples_of_megatrons_rule(start, increment, increments, ramp_samples):
    config = ramp(start, increment, ramp_samples)
    end = start + increment * increments
    batches = build_batch_ramp(end, config)
    consumed = 0
    assert batches.consumed_samples(0) == 0
    for step, size in enumerate(megatron_sizes(end, config, 200), start=1):
        assert batches.global_batch_size(step) == size
        consumed += size
        assert batches.consumed_samples(step) == consumed
        assert batches.step_of(consumed) == step


def test_a_known_ramp():
    batches = build_batch_ramp(16, ramp(4, 4, 36))
    assert [batches.global_batch_size(step) for step in range(1, 10)] == [4, 4, 4, 8, 8, 12, 16, 16, 16]
    assert batches.consumed_samples(1_000_000) == 40 + 16 * (1_000_000 - 6)


def test_no_ramp_is_one_size():
    batches = build_batch_ramp(32, None)
    assert batches.global_batch_size(1) == batches.global_batch_size(10**9) == 32
    assert batches.consumed_samples(7) == 224
    assert batches.step_of(224) == 7


@pytest.mark.parametrize("samples", [-4, 3, 13])
def test_samples_between_two_steps_are_refused_with_the_number(samples):
    with pytest.raises(InputError, match=f"{samples} consumed samples .*trainer.rampup_batch_size"):
        build_batch_ramp(16, ramp(4, 4, 36)).step_of(samples)


def test_updates_are_numbered_from_one():
    with pytest.raises(ValueError, match="step = 0"):
        build_batch_ramp(8, None).global_batch_size(0)


@pytest.fixture(scope="module")
def with_ramp():
    cfg = compose(["+model=gpt_tiny", "trainer.global_batch_size=16", "trainer.micro_batch_size=2"])
    return lambda rampup: dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, rampup_batch_size=rampup))


@pytest.mark.parametrize(
    ("config", "data_parallel_size", "keys"),
    [
        (None, 3, []),
        (ramp(4, 4, 100), 2, []),
        (ramp(20, 4, 100), 2, ["start_global_batch_size"]),
        (ramp(4, 5, 100), 1, ["increment", "increment"]),
        (ramp(4, 4, 100), 4, ["start_global_batch_size", "increment"]),
        (ramp(16, 5, 100), 4, []),
    ],
)
def test_check_names_each_key_that_does_not_fit(with_ramp, config, data_parallel_size, keys):
    problems = list(check_batch_ramp(with_ramp(config), data_parallel_size))
    assert [problem.key for problem in problems] == [f"trainer.rampup_batch_size.{key}" for key in keys]


def test_sizes_that_pass_the_check_are_all_multiples(with_ramp):
    cfg = with_ramp(ramp(4, 4, 50))
    assert not list(check_batch_ramp(cfg, 2))
    trainer = cfg.trainer
    batches = build_batch_ramp(trainer.global_batch_size, trainer.rampup_batch_size)
    assert len(batches.stages) == 4
    assert all(stage.global_batch_size % (2 * 2) == 0 for stage in batches.stages)


def test_check_message_shows_value_unit_and_fix(with_ramp):
    problem = next(check_batch_ramp(with_ramp(ramp(4, 12, 50)), 4))
    assert "start_global_batch_size = 4" in str(problem)
    assert "divisible by 8 (micro-batch x data-parallel size" in str(problem)
    assert "set it to 8" in str(problem)
