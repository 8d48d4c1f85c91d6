"""Generation gives what the model gives without a cache, in any batch and on any layout."""

from pathlib import Path

import pytest

from tests.inference.world import (
    PROMPTS,
    generate_tokens,
    greedy_without_cache,
    losses_by_log_softmax,
    losses_of_texts,
    save_random_model,
)
from tests.ranks import RankPool

GREEDY = ("sampling.max_new_tokens=12", "sampling.ignore_eod=true")
SAMPLED = (*GREEDY, "sampling.temperature=0.9", "sampling.top_p=0.9", "sampling.repetition_penalty=1.1")
LATENT = (
    "model.num_query_groups=4",
    "model.mla={q_lora_rank:null,kv_lora_rank:32,qk_head_dim:16,qk_pos_emb_head_dim:8,v_head_dim:12}",
)
LAYOUTS = {
    "TP2": (2, "parallelism=tp2"),
    "PP2": (2, "parallelism=pp2"),
    "TP2 PP2": (4, "parallelism=tp2_pp2"),
    "DP2": (2, "parallelism=dp"),
}


@pytest.fixture(scope="module")
def dense(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    return ranks.run(save_random_model, 1, str(tmp_path_factory.mktemp("dense")), "gpt_tiny")[0]


@pytest.fixture(scope="module")
def experts(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("experts"))
    return ranks.run(save_random_model, 1, folder, "moe_tiny")[0]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, dense: str) -> list[list[int]]:
    return ranks.run(generate_tokens, 1, dense, len(PROMPTS), *GREEDY)[0]


def test_greedy_equals_the_model_without_a_cache(ranks: RankPool, dense: str, alone: list) -> None:
    assert alone == ranks.run(greedy_without_cache, 1, dense, 12)[0]
    assert len({token for tokens in alone for token in tokens}) > 10, "texts without variety prove nothing"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_changes_nothing(ranks: RankPool, dense: str, alone: list, batch_size: int) -> None:
    assert ranks.run(generate_tokens, 1, dense, batch_size, *GREEDY)[0] == alone
    sampled = [ranks.run(generate_tokens, 1, dense, size, *SAMPLED)[0] for size in (batch_size, len(PROMPTS))]
    assert sampled[0] == sampled[1]
    assert sampled[0] != alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_dense_model_equal_one_process(ranks: RankPool, dense: str, alone: list, layout: str) -> None:
    processes, choice = LAYOUTS[layout]
    for tokens in ranks.run(generate_tokens, processes, dense, len(PROMPTS), *GREEDY, choice):
        assert tokens == alone
    expected = ranks.run(losses_of_texts, 1, dense)[0]
    for losses in ranks.run(losses_of_texts, processes, dense, choice):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [(2, "parallelism=ep2"), (4, "parallelism=tp2_ep2")], ids=["EP2", "TP2 EP2"])
def test_layouts_of_experts_equal_one_process(ranks: RankPool, experts: str, layout: tuple) -> None:
    expected = ranks.run(greedy_without_cache, 1, experts, 12)[0]
    for tokens in ranks.run(generate_tokens, layout[0], experts, len(PROMPTS), *GREEDY, layout[1]):
        assert tokens == expected


def test_losses_equal_the_log_softmax(ranks: RankPool, dense: str) -> None:
    assert ranks.run(losses_of_texts, 1, dense)[0] == pytest.approx(
        ranks.run(losses_by_log_softmax, 1, dense)[0], rel=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        ("model.position_embedding_type=learned_absolute",),
        ("model.window_size=5",),
        ("model.attn_logit_softcapping=20.0", "model.final_logit_softcapping=10.0"),
        ("model.num_query_groups=4", "model.qk_layernorm=true", "model.share_embeddings_and_output_weights=true"),
        LATENT,
        (*LATENT, "model.rope_scaling={type:yarn,factor:4.0,original_max_position_embeddings:32,mscale_all_dim:0.7}"),
    ],
    ids=["learned positions", "window", "soft caps", "no groups", "latent", "latent, yarn"],
)
def test_kinds_of_attention(ranks: RankPool, tmp_path: Path, change: tuple) -> None:
    folder = ranks.run(save_random_model, 1, str(tmp_path), "gpt_tiny", *change)[0]
    assert ranks.run(generate_tokens, 1, folder, 3, *GREEDY)[0] == ranks.run(greedy_without_cache, 1, folder, 12)[0]
