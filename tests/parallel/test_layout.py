"""Rank arithmetic: properties that hold for every layout, and groups as Megatron-Core 0.16.1 itself makes them."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_llm.config.compose.load import compose
from nemo_llm.parallel.layout import ParallelLayout
from tests.parallel.rank_grid import DENSE_AXES, EXPERT_AXES, RankGrid

SMALL = st.sampled_from([1, 2, 3])
# Other work on the machine may slow single examples; only the results matter here.
quick = settings(deadline=None, max_examples=40)


@st.composite
def layouts(draw: st.DrawFn) -> RankGrid:
    tp, cp, pp, dp = (draw(SMALL) for _ in range(4))
    per_stage = tp * cp * dp
    etp = draw(st.sampled_from([size for size in range(1, per_stage + 1) if per_stage % size == 0]))
    rest = per_stage // etp
    ep = draw(st.sampled_from([size for size in range(1, rest + 1) if rest % size == 0]))
    return RankGrid(world_size=per_stage * pp, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


@quick
@given(layouts())
def test_coordinates_and_ranks_are_inverse(layout: RankGrid) -> None:
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        assert layout.rank_of(**{axis: place[axis] for axis in DENSE_AXES}) == rank
        assert layout.expert_rank_of(**{axis: place[axis] for axis in EXPERT_AXES}) == rank


@quick
@given(layouts())
def test_both_grids_cover_the_same_ranks(layout: RankGrid) -> None:
    assert layout.tp * layout.cp * layout.dp == layout.etp * layout.ep * layout.edp
    assert layout.tp * layout.cp * layout.dp * layout.pp == layout.world_size
    dense = {layout.rank_of(tp=t, cp=c, dp=d, pp=p) for t, c, d, p in ranges(layout, DENSE_AXES)}
    expert = {layout.expert_rank_of(etp=t, ep=e, edp=d, pp=p) for t, e, d, p in ranges(layout, EXPERT_AXES)}
    assert dense == expert == set(range(layout.world_size))


def ranges(layout: RankGrid, axes: tuple[str, ...]) -> product:
    return product(*(range(layout.size(axis)) for axis in axes))


@quick
@given(layouts(), st.sampled_from([("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("tp", "pp"), DENSE_AXES]))
def test_dense_groups_partition_the_ranks(layout: RankGrid, axes: tuple[str, ...]) -> None:
    check_partition(layout, axes)


@quick
@given(layouts(), st.sampled_from([("etp",), ("ep",), ("edp",), ("pp",), ("etp", "ep"), EXPERT_AXES]))
def test_expert_groups_partition_the_ranks(layout: RankGrid, axes: tuple[str, ...]) -> None:
    check_partition(layout, axes)


def check_partition(layout: RankGrid, axes: tuple[str, ...]) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    size = 1
    for axis in axes:
        size *= layout.size(axis)
    assert {len(group) for group in groups} == {size}
    grid = DENSE_AXES if set(axes) <= set(DENSE_AXES) else EXPERT_AXES
    for group in groups:
        assert list(group) == sorted(group)
        for axis in set(grid) - set(axes):
            assert len({layout.coordinates(rank)[axis] for rank in group}) == 1
        assert layout.group_of(group[0], *axes) == group


@quick
@given(layouts())
def test_a_pipeline_stage_is_one_block_of_ranks(layout: RankGrid) -> None:
    """Pipeline ranks vary slowest, so that both grids agree on who is on which stage."""
    per_stage = layout.world_size // layout.pp
    for rank in range(layout.world_size):
        assert layout.coordinates(rank)["pp"] == rank // per_stage


@quick
@given(layouts(), st.integers(1, 8), st.integers(1, 8))
def test_microbatches_cover_the_global_batch(layout: RankGrid, micro: int, count: int) -> None:
    batch = micro * count * layout.dp
    assert layout.num_microbatches(batch, micro) == count
    if micro * layout.dp > 1:
        with pytest.raises(ValueError, match=str(batch + 1)):
            layout.num_microbatches(batch + 1, micro)


# Written down from megatron.core.parallel_state.RankGenerator (0.16.1, order tp-cp-ep-dp-pp) for 16 processes with
# TP 2, CP 2, PP 2 and, on the expert grid, EP 4 with ETP 1.
MEGATRON_GROUPS = {
    ("tp",): [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
    ("cp",): [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]],
    ("dp",): [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
    ("pp",): [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
    ("dp", "cp"): [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],
    ("tp", "pp"): [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]],
    ("ep",): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    ("edp",): [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
}


@pytest.mark.parametrize("axes", MEGATRON_GROUPS)
def test_groups_are_megatrons(axes: tuple[str, ...]) -> None:
    layout = RankGrid(world_size=16, tp=2, cp=2, pp=2, ep=4, etp=1)
    assert [list(group) for group in layout.groups(*axes)] == MEGATRON_GROUPS[axes]


def test_from_config_takes_tensor_parallel_size_for_experts_unless_told() -> None:
    layout = ParallelLayout.from_config(compose(["model=gpt_tiny", "parallelism=tp2_pp2"]).parallelism, 8)
    assert (layout.tp, layout.pp, layout.vp, layout.dp, layout.etp, layout.edp) == (2, 2, 1, 2, 2, 2)
    layout = ParallelLayout.from_config(compose(["model=moe_tiny", "parallelism=tp2_ep2"]).parallelism, 4)
    assert (layout.tp, layout.dp, layout.ep, layout.etp, layout.edp) == (2, 2, 2, 1, 2)
    assert ParallelLayout.from_config(compose(["model=gpt_tiny", "parallelism=pp2_vp2"]).parallelism, 2).vp == 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"world_size": 3, "tp": 2}, "world size 3 is not a multiple of tp x cp x pp = 2"),
        ({"world_size": 2, "ep": 4}, "etp x ep x pp = 4"),
        ({"world_size": 2, "tp": 0}, "tp = 0"),
    ],
)
def test_impossible_layouts_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelLayout(**sizes)


def test_ranks_and_axes_outside_are_refused() -> None:
    layout = RankGrid(world_size=4, tp=2)
    with pytest.raises(ValueError, match=r"rank 4 is outside 0\.\.3"):
        layout.coordinates(4)
    with pytest.raises(ValueError, match=r"tp index 2 is outside 0\.\.1"):
        layout.rank_of(tp=2)
    with pytest.raises(ValueError, match="not all of"):
        layout.groups("tp", "ep")


def test_describe() -> None:
    assert ParallelLayout(world_size=1).describe() == "1 process: DP 1"
    assert (
        ParallelLayout(world_size=16, tp=2, pp=2, vp=2, etp=2).describe() == "16 processes: TP 2 x PP 2 x VP 2 x DP 4"
    )
    text = ParallelLayout(world_size=4, tp=2, ep=2, etp=1).describe()
    assert text == "4 processes: TP 2 x EP 2 x ETP 1 x EDP 2 x DP 2"
