"""Muon: the iteration, one step beside PyTorch's, and the same training in every layout."""

import pytest
import torch

from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.optim import MuonConfig
from nemo_llm.optim.muon import GroupPlace, Matrix, Muon, Piece, orthogonalize
from nemo_llm.parallel.runtime import own_runtime
from tests.parity.layouts import DENSE, MOE, Layout, train_losses
from tests.ranks import RankPool

RULE = MuonConfig(momentum=0.95, newton_schulz_steps=5)
WITH_MUON = ("optim=muon",)


@pytest.mark.parametrize("shape", [(24, 48), (16, 60), (60, 16)])
def test_orthogonalize_keeps_singular_vectors_and_evens_the_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    result = orthogonalize(x, 5)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ result @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-6
    assert diagonal.min() > 0.4
    assert diagonal.max() < 1.3


def test_step_agrees_with_pytorchs_muon() -> None:
    torch.manual_seed(0)
    cfg = compose(["+model=gpt_tiny", "trainer.accelerator=cpu"])
    for shape in ((32, 48), (48, 32)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        settings = {"lr": 0.02, "weight_decay": 0.1}
        peer = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
        optimizer = Muon([ours], **settings)
        with own_runtime(cfg.runtime_setting) as runtime:
            place = GroupPlace(runtime.groups.tp, 0, 1, torch.float32)
            matrix = Matrix(*shape, split=None, inner=(1, 1, shape[0]))
            optimizer.connect(RULE, [matrix], {ours: Piece(0, 0, 0, ours.numel())}, place)
            for _ in range(3):
                ours.grad = torch.randn(shape)
                theirs.grad = ours.grad.clone()
                optimizer.step()
                peer.step()
        # PyTorch's iteration runs in bfloat16.
        assert (ours - theirs).norm() < 0.02 * (theirs - 1).norm()
        assert set(optimizer.state[ours]) == {"exp_avg"}


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    heads, size, columns = 2, 3, 5
    groups = 2
    matrix = Matrix(groups * (heads + 2) * size, columns, 0, (groups, heads + 2, size))
    rows = torch.arange(2 * matrix.rows).view(2, matrix.rows, 1).expand(2, -1, columns)
    q, k, v = (part.reshape(-1, columns)[:, 0].tolist() for part in matrix.parts(rows.contiguous()))
    per_group = (heads + 2) * size
    assert q == [g * per_group + i for g in range(2 * groups) for i in range(heads * size)]
    assert k == [g * per_group + heads * size + i for g in range(2 * groups) for i in range(size)]
    assert v == [g * per_group + (heads + 1) * size + i for g in range(2 * groups) for i in range(size)]


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, list]:
    return {model: ranks.run(train_losses, 1, model, (), WITH_MUON)[0] for model in ("gpt_tiny", "moe_tiny")}


DENSE_LAYOUTS = [("gpt_tiny", DENSE[number]) for number in (0, 1, 2, 3, 6, 12, 14)]
# With a distributed optimizer each rank has whole experts (check_optimizer); without one they may be split.
MOE_NAMES = ("EP2 distributed optimizer", "TP2 SP ETP1 distributed optimizer", "TP2 SP EP2 ETP1", "ETP2")
MOE_LAYOUTS = [("moe_tiny", layout) for layout in MOE if layout.name in MOE_NAMES]


@pytest.mark.parametrize(
    ("model", "layout"),
    DENSE_LAYOUTS + MOE_LAYOUTS,
    ids=lambda value: value.name if isinstance(value, Layout) else value,
)
def test_layout_equals_one_process(model: str, layout: Layout, ranks: RankPool, single: dict) -> None:
    for losses in ranks.run(train_losses, layout.processes, model, layout.overrides, WITH_MUON):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(losses, single[model], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)


def test_muon_learns_otherwise_than_adamw(ranks: RankPool, single: dict) -> None:
    adamw = ranks.run(train_losses, 1, "gpt_tiny", ())[0]
    assert adamw[0] == single["gpt_tiny"][0]
    assert adamw[-1][0] != pytest.approx(single["gpt_tiny"][-1][0], rel=1e-3)


def losses_in_small_windows(overrides: tuple[str, ...]) -> list:
    """`train_losses` of two layers' worth of windows: parameters are cut, and several share a window."""
    from nemo_llm.optim import host_offload

    usual, host_offload._WINDOW_ELEMENTS = host_offload._WINDOW_ELEMENTS, 5000
    try:
        return train_losses("gpt_tiny", overrides, ("performance.offload_optimizer_moments=true", "precision=bf16"))
    finally:
        host_offload._WINDOW_ELEMENTS = usual


def test_windows_change_no_bit_of_sharded_moments(ranks: RankPool) -> None:
    layout = DENSE[2]
    plain = ranks.run(train_losses, layout.processes, "gpt_tiny", layout.overrides, ("precision=bf16",))
    assert ranks.run(losses_in_small_windows, layout.processes, layout.overrides) == plain


def test_offloaded_moments_change_no_bit(ranks: RankPool) -> None:
    offloaded = ("performance.offload_optimizer_moments=true",)
    for overrides in ((), ("precision=bf16",)):
        plain = ranks.run(train_losses, 1, "gpt_tiny", (), overrides)[0]
        assert ranks.run(train_losses, 1, "gpt_tiny", (), (*overrides, *offloaded))[0] == plain
