"""Each field of Megatron's configuration: changes the numbers, changes speed or memory alone, or is refused by name."""

import dataclasses
from typing import Any

import pytest

from nemo_llm.config.checks import find_problems
from nemo_llm.config.compose.catalog import known_keys
from nemo_llm.megatron.config_fields import FIELDS, OWN_KEYS, UNREAD
from tests.models.key_effects import changed, effects
from tests.ranks import RankPool

GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
BIAS = {"moe_router_enable_expert_bias": True}
# A model, overrides, and the value that is set besides them.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "activation_func_clamp_value": ("dense", {}, 0.001),
    "glu_linear_offset": ("dense", {}, 0.5),
    "no_rope_freq": ("dense", {}, 2),
    "moe_apply_probs_on_input": ("one expert", {}, True),
    "moe_expert_capacity_factor": ("experts", {}, 0.5),
    "moe_pad_expert_input_to_capacity": ("experts", {"moe_expert_capacity_factor": 0.5}, True),
    "moe_router_bias_update_rate": ("sigmoid experts", BIAS, 0.5),
    "moe_router_dtype": ("bf16 experts", {}, "fp32"),
    "moe_router_enable_expert_bias": ("sigmoid experts", {}, True),
    "moe_router_group_topk": ("experts", GROUPS, 2),
    "moe_router_num_groups": ("experts", GROUPS, 2),
    "moe_router_topk_scaling_factor": ("experts", {}, 2.5),
    "moe_shared_expert_gate": ("experts", {}, True),
    "moe_shared_expert_overlap": ("experts", {}, True),
    "moe_token_drop_policy": ("experts", {"moe_expert_capacity_factor": 0.5}, "position"),
}
# A model in which the field would have no effect.
WITHOUT_EFFECT = {
    "activation_func_clamp_value": "plain MLP",
    "glu_linear_offset": "plain MLP",
    "no_rope_freq": "learned",
    "moe_apply_probs_on_input": "experts",
    "moe_pad_expert_input_to_capacity": "experts",
    "moe_router_bias_update_rate": "sigmoid experts",
    "moe_router_dtype": "experts",
    "moe_router_enable_expert_bias": "experts",
    "moe_router_group_topk": "experts",
    "moe_router_num_groups": "experts",
    "moe_token_drop_policy": "experts",
}


def _fields_of_megatron() -> list[str]:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    classes = (TransformerConfig, MLATransformerConfig)
    return sorted({field.name for class_ in classes for field in dataclasses.fields(class_)})


def test_the_table_has_each_field_of_megatron_once(ranks: RankPool) -> None:
    assert sorted([*FIELDS, *OWN_KEYS, *UNREAD]) == ranks.run(_fields_of_megatron, 1)[0]


def test_fields_change_the_numbers_or_speed_and_memory_alone(ranks: RankPool) -> None:
    assert sorted(CASES) == sorted(FIELDS)
    runs: list[tuple[str, dict[str, Any]]] = []
    for name, (model, beside, value) in CASES.items():
        runs += [(model, {"mcore_overrides": beside}), (model, {"mcore_overrides": {**beside, name: value}})]
        assert not find_problems(changed(*runs[-1]), 1), name
    found = ranks.run(effects, 1, runs, 4)[0]
    for (name, (_, _, value)), before, after in zip(CASES.items(), found[::2], found[1::2], strict=True):
        assert name == "no_rope_freq" or after.config[name] == value, name  # Megatron makes that a list
        if FIELDS[name].numbers:
            assert after.numbers != before.numbers, name
        else:
            assert after.parameters == before.parameters, name
            assert after.figures == [pytest.approx(step, rel=1e-5) for step in before.figures], name


def _refused(model: str, name: str, value: Any) -> str:
    """What is said about the field."""
    cfg = changed(model, {"mcore_overrides": {name: value}})
    return " ".join(str(one) for one in find_problems(cfg, 1) if one.key == f"model.mcore_overrides.{name}")


def test_others_are_refused_with_what_to_use() -> None:
    names = [*OWN_KEYS, *UNREAD]
    problems = find_problems(changed("dense", {"mcore_overrides": dict.fromkeys(names, True)}), 1)
    assert [problem.key for problem in problems] == [f"model.mcore_overrides.{name}" for name in names]
    for problem, name in zip(problems, names, strict=True):
        assert OWN_KEYS.get(name, "remove it") in problem.fix


def test_keys_of_ours_exist() -> None:
    keys = {key for named in OWN_KEYS.values() for key in named.split(" and ")}
    assert keys - set(known_keys()) == {"model.mcore_overrides.moe_router_num_groups"}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_refused_where_they_have_no_effect(name: str) -> None:
    model = WITHOUT_EFFECT.get(name, "dense")
    assert "has an effect with" in _refused(model, name, CASES[name][2])
    assert "must be" in _refused(CASES[name][0], name, "fp8")


@pytest.mark.parametrize(("groups", "chosen"), [(3, 1), (2, 2), (4, 3), (8, 1), (4, 0)])
def test_groups_of_experts_that_limit_nothing_or_do_not_divide_are_refused(groups: int, chosen: int) -> None:
    cfg = changed("experts", {"mcore_overrides": {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}})
    assert find_problems(cfg, 1)


def test_a_layer_of_the_users_own_may_read_more() -> None:
    settings = {"mcore_overrides": {"softmax_type": "learnable"}, "layer_spec": "my.layers:build"}
    assert not find_problems(changed("dense", settings), 1)
