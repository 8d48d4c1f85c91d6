"""Pipeline stages: every layer exactly once, in order, as Megatron places them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_llm.config import ParallelismConfig
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.pipeline_layout import LayoutStage, parse_pipeline_layout
from nemo_llm.parallel.stages import format_table, plan_stages

SINGLE = compose(["model=gpt_tiny"]).parallelism


def pipeline(pp: int, vp: int | None = None, layout: str | None = None) -> ParallelismConfig:
    return dataclasses.replace(
        SINGLE,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        pipeline_model_parallel_layout=layout,
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_even_stages_hold_every_layer_once(pp: int, vp: int, per_chunk: int) -> None:
    plan = plan_stages(pp * vp * per_chunk, pipeline(pp, vp))
    assert [layer for stage in plan.stages for layer in stage.layers] == list(range(pp * vp * per_chunk))
    assert {plan.num_layers(rank) for rank in range(pp)} == {vp * per_chunk}
    # Megatron: offset of chunk v on stage r is v * (layers / vp) + r * (layers / vp / pp).
    for stage in plan.stages:
        assert stage.layers.start == stage.vp_rank * pp * per_chunk + stage.pp_rank * per_chunk
    assert [stage for stage in plan.stages if stage.has_embedding] == [plan.stage(0, 0)]
    assert [stage for stage in plan.stages if stage.has_loss] == [plan.stage(pp - 1, vp - 1)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_uneven_stages_hold_what_the_string_says(pp: int, vp: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 3), min_size=pp * vp, max_size=pp * vp))
    layout = "E" + "|".join("t" * count for count in counts) + "L"
    plan = plan_stages(sum(counts), pipeline(pp, vp, layout))
    assert [len(stage.layers) for stage in plan.stages] == counts
    assert [layer for stage in plan.stages for layer in stage.layers] == list(range(sum(counts)))


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("Et*3|t*4|t*4|t*3L", [3, 4, 4, 3]),
        ("Ettt|(tt|)*3L", [3, 2, 2, 2, 0]),
        ("E|(t|)*2,ttL", [0, 1, 1, 2]),
        ("(Et|)*1tL", [1, 1]),
        ("E t | t L", [1, 1]),
        ("Et|*2tL", [1, 0, 1]),
    ],
)
def test_notation(layout: str, counts: list[int]) -> None:
    stages = parse_pipeline_layout(layout)
    assert [stage.num_layers for stage in stages] == counts
    assert stages[0].has_embedding
    assert stages[-1].has_loss


def test_embedding_and_loss_may_stand_alone() -> None:
    assert parse_pipeline_layout("E|tt|L") == (
        LayoutStage(0, True, False),
        LayoutStage(2, False, False),
        LayoutStage(0, False, True),
    )


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("Ex|tL", "'x' is not part"),
        ("tt|tL", "start with the embedding"),
        ("Et|tt", "end with the loss"),
        ("EtE|tL", "once"),
        ("Et|tm|L", "not supported"),
        ("E(t|*2tL", "not part of the notation"),
        ("", "start with the embedding"),
    ],
)
def test_wrong_notation_is_refused(layout: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_pipeline_layout(layout)


@pytest.mark.parametrize(
    ("num_layers", "parallelism", "words"),
    [
        (5, pipeline(2), "5 layers do not divide evenly over 2 stages x 1 chunks"),
        (2, pipeline(2, 2), "2 layers do not divide"),
        (3, pipeline(2, None, "Et|t|tL"), "3 stages, but PP x VPP is 2 x 1"),
        (4, pipeline(2, None, "Et|ttL"), "3 layers, but the model has 4"),
    ],
)
def test_impossible_plans_are_refused(num_layers: int, parallelism: ParallelismConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_stages(num_layers, parallelism)


def test_table() -> None:
    lines = plan_stages(5, pipeline(2, 2, "Ett|t|t|tL")).table().splitlines()
    assert lines[0].split() == ["stage", "chunk", "0", "chunk", "1"]
    assert "embedding + 0-1" in lines[2]
    assert lines[3].split() == ["1", "2", "4", "+", "loss"]
    assert "(empty)" in plan_stages(2, pipeline(2, 2, "Et||t|L")).table()


def test_format_table_aligns() -> None:
    assert format_table([["a", "bb"], ["ccc", "d"]]) == "a    bb\n---  --\nccc   d"
