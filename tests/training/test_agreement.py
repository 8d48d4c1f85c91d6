"""Which keys a resume may change, on the configuration that the project ships."""

import dataclasses
import functools
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from nemo_llm.config import Fp8Config, MoeConfig
from nemo_llm.config.compose.catalog import known_keys
from nemo_llm.config.compose.load import compose
from nemo_llm.errors import NO_VALUE, ConfigError
from nemo_llm.run.folder import to_plain
from nemo_llm.run.resume_rules import CHANGEABLE_KEYS, FIXED_KEYS, Change, check_agreement, compare_configs

HALF = "trainer.micro_batch_size=4"


@functools.cache
def config(*overrides):
    return to_plain(compose(["+model=gpt_tiny", *overrides]))


def keys_of(section, prefix=""):
    for name, value in section.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def test_same_configuration_has_no_changes():
    assert compare_configs(config(), config()) == ([], [])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=77",
        "trainer.micro_batch_size=4",
        "parallelism.tensor_model_parallel_size=2",
        "optim.lr=0.5",
        "optim.sched.decay_steps=123456",
        "evaluation.interval=7",
        "evaluation.limit=7",
        "checkpoint.save_interval=3",
        "exp_manager.enabled=false",
        "cluster.gpu_name=H100",
        "run.name=other",
    ],
)
def test_allowed_change_is_listed(override):
    key = override.split("=")[0]
    changed, forbidden = compare_configs(config(), config(override))
    assert [change.key for change in changed] == [key]
    assert forbidden == []


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=4096",
        "trainer.global_batch_size=24",
        "trainer.seed=5",
        "optim.adam_beta2=0.5",
        "task.z_loss_coeff=0.1",
        "data.seq_length=64",
        "precision.params_dtype=fp16",
        "trainer.rampup_batch_size={start_global_batch_size: 8, increment: 8, ramp_samples: 100}",
    ],
)
def test_forbidden_change_is_refused_by_name_with_both_values(override):
    key = override.split("=")[0]
    before, after = config(), config(override)
    with pytest.raises(ConfigError, match=r"runs/x/config.yaml was made with") as caught:
        check_agreement(before, after, Path("runs/x/config.yaml"))
    assert [problem.key for problem in caught.value.problems] == [key]
    old = before
    for part in key.split("."):
        old = old[part]
    assert repr(old) in str(caught.value)


def test_every_forbidden_key_is_reported_and_allowed_ones_are_not():
    with pytest.raises(ConfigError) as caught:
        check_agreement(config(), config("trainer.seed=5", "data.seq_length=64", "trainer.max_steps=7"), Path("c"))
    assert [problem.key for problem in caught.value.problems] == ["data.seq_length", "trainer.seed"]


def test_an_override_that_never_had_an_effect_may_go():
    saved = config()
    saved = {**saved, "model": {**saved["model"], "mcore_overrides": {"softmax_type": "learnable", "qk_clip": True}}}
    allowed, forbidden = compare_configs(saved, config())
    assert {change.key for change in allowed} == {
        "model.mcore_overrides.softmax_type",
        "model.mcore_overrides.qk_clip",
    }
    assert forbidden == []
    saved["model"]["mcore_overrides"] = {"glu_linear_offset": 1.0}
    assert [change.key for change in compare_configs(saved, config())[1]] == ["model.mcore_overrides.glu_linear_offset"]


def test_user_may_allow_more():
    changed = check_agreement(config(), config("trainer.seed=5"), Path("c"), also_allowed=["trainer.seed"])
    assert changed == [Change("trainer.seed", config()["trainer"]["seed"], 5)]


def test_run_dir_is_not_compared():
    assert compare_configs(config(), config("run.dir=/elsewhere")) == ([], [])


def test_key_added_by_a_later_version_agrees_while_it_is_null():
    assert compare_configs({"model": {}}, {"model": {"new": None}}) == ([], [])
    assert compare_configs({"model": {}}, {"model": {"new": 1}}) == ([], [Change("model.new", NO_VALUE, 1)])


def test_every_key_is_changeable_or_fixed():
    known = known_keys()
    leaves = {key for key in known if not any(other.startswith(f"{key}.") for other in known)} - {"run.dir"}
    # What stands in a mapping of any names is matched as one of its names is.
    matched = {
        pattern: {key for key in leaves if fnmatchcase(key, pattern) or fnmatchcase(f"{key}.any", pattern)}
        for pattern in (*CHANGEABLE_KEYS, *FIXED_KEYS)
    }
    assert leaves - set().union(*matched.values()) == set()
    changeable = set().union(*(matched[pattern] for pattern in CHANGEABLE_KEYS))
    assert [pattern for pattern in FIXED_KEYS if not matched[pattern] - changeable] == []
    for pattern in FIXED_KEYS:
        section = pattern.partition(".")[0]
        assert f"{section}.*" not in CHANGEABLE_KEYS, pattern


def test_every_pattern_names_a_key_that_exists():
    known = set(keys_of(config()))
    optional = ("model.moe.", "precision.fp8.")  # sections that are null in this model
    stale = [key for key in CHANGEABLE_KEYS if not key.startswith(optional) and key.removesuffix(".*") not in known]
    assert stale == []


def test_patterns_of_optional_sections_name_fields_that_exist():
    fields = {f"model.moe.{field.name}" for field in dataclasses.fields(MoeConfig)}
    fields |= {f"precision.fp8.{field.name}" for field in dataclasses.fields(Fp8Config)}
    patterns = [pattern for pattern in CHANGEABLE_KEYS if pattern.startswith(("model.moe.", "precision.fp8."))]
    assert len(patterns) >= 5
    assert [pattern for pattern in patterns if not any(fnmatchcase(field, pattern) for field in fields)] == []


def test_added_and_removed_validation_sets_are_listed():
    one, two = {"data": {"validation": {}}}, {"data": {"validation": {"news": [0.3, "a"]}}}
    assert compare_configs(one, two) == ([Change("data.validation.news", NO_VALUE, [0.3, "a"])], [])
    assert compare_configs(two, one) == ([Change("data.validation.news", [0.3, "a"], NO_VALUE)], [])


@pytest.mark.parametrize(
    ("router", "fixed"),
    [
        ([], True),
        (["model.moe.moe_router_load_balancing_type=seq_aux_loss"], True),
        (["model.moe.moe_aux_loss_coeff=0"], False),
        (["model.moe.moe_aux_loss_coeff=0", "model.moe.moe_z_loss_coeff=0.001"], True),
        (["model.moe.moe_router_load_balancing_type=none"], False),
    ],
)
def test_a_router_with_a_loss_fixes_the_micro_batch(router: list[str], fixed: bool) -> None:
    before, after = (to_plain(compose(["+model=moe_tiny", *router, *more])) for more in ([], [HALF]))
    if not fixed:
        assert [change.key for change in check_agreement(before, after, Path("c"))] == ["trainer.micro_batch_size"]
        return
    with pytest.raises(ConfigError, match=r"trainer.micro_batch_size.*balanced over the tokens of a micro-batch") as e:
        check_agreement(before, after, Path("c"))
    assert "set trainer.micro_batch_size back to 8" in str(e.value)
