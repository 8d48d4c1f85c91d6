"""Latent attention: every layout trains as one process does."""

import pytest

from tests.parity.layouts import DENSE, MOE, Layout, train_losses
from tests.ranks import RankPool

LATENT = (
    "model.num_query_groups=8",
    "model.mla={q_lora_rank:24,kv_lora_rank:32,qk_head_dim:16,qk_pos_emb_head_dim:8,v_head_dim:12}",
)
FIRST_DENSE = (*LATENT, "model.moe.moe_first_k_dense_replace=1", "model.moe.moe_shared_expert_intermediate_size=64")
EXTRA = {"gpt_tiny": LATENT, "moe_tiny": FIRST_DENSE}
DENSE_NAMES = ("TP2", "TP2 SP", "PP2 VPP2", "CP2 all-to-all", "CP2 gathered KV", "TP2 SP PP2 distributed optimizer")
MOE_NAMES = ("EP2 distributed optimizer", "TP2 SP EP2", "PP2 EP2")
CASES = [("gpt_tiny", layout) for layout in DENSE if layout.name in DENSE_NAMES]
CASES += [("moe_tiny", layout) for layout in MOE if layout.name in MOE_NAMES]


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, list]:
    return {model: ranks.run(train_losses, 1, model, (), extra)[0] for model, extra in EXTRA.items()}


@pytest.mark.parametrize(
    ("model", "layout"), CASES, ids=lambda value: value.name if isinstance(value, Layout) else value
)
def test_layout_equals_one_process(model: str, layout: Layout, ranks: RankPool, single: dict) -> None:
    for losses in ranks.run(train_losses, layout.processes, model, layout.overrides, EXTRA[model]):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(losses, single[model], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
