"""The planner's arithmetic against real Megatron models on warm ranks."""

import pytest

from nemo_llm.config.load import compose
from nemo_llm.parallel.layout import ParallelLayout
from nemo_llm.parallel.stages import plan_stages
from nemo_llm.planner.activations import layer_activations
from nemo_llm.planner.memory import local_parameters
from nemo_llm.planner.parameters import count_parameters
from tests.planner.measure import count_local_parameters, measure_layer_bytes
from tests.ranks import RankPool

VOCAB_SIZE = 2048

LATENT = (
    "model.num_query_groups=6 "
    "model.mla={q_lora_rank:24,kv_lora_rank:32,qk_head_dim:16,qk_pos_emb_head_dim:8,v_head_dim:16}"
)
LAYOUTS = [
    ("model=gpt_tiny", 1),
    ("model=gpt_tiny model.normalization=LayerNorm model.add_bias_linear=true model.qk_layernorm=true", 1),
    (
        "model=gpt_tiny model.position_embedding_type=learned_absolute model.share_embeddings_and_output_weights=false",
        1,
    ),
    (
        "model=gpt_tiny parallelism=tp2 model.add_qkv_bias=true model.gated_linear_unit=false",
        2,
    ),
    ("model=gpt_tiny parallelism=pp2", 2),
    ("model=gpt_tiny parallelism=tp2_pp2 model.add_bias_linear=true", 4),
    ("model=gpt_tiny parallelism=pp2_vp2 model.share_embeddings_and_output_weights=false", 2),
    ("model=gpt_tiny parallelism=pp2 parallelism.pipeline_model_parallel_layout='Et|t*3L'", 2),
    ("model=moe_tiny parallelism=ep2", 2),
    ("model=moe_tiny parallelism=tp2_ep2", 4),
    ("model=moe_tiny model.moe.moe_shared_expert_intermediate_size=64 model.moe.moe_layer_freq=2", 1),
    (f"model=moe_tiny {LATENT} model.moe.moe_first_k_dense_replace=1", 1),
    (f"model=moe_tiny {LATENT} model.moe.moe_first_k_dense_replace=1 parallelism=tp2_ep2", 4),
]


@pytest.mark.parametrize(("arguments", "processes"), LAYOUTS, ids=[arguments for arguments, _ in LAYOUTS])
def test_every_rank_holds_what_the_planner_counts(arguments: str, processes: int, ranks: RankPool) -> None:
    overrides = tuple(arguments.split())
    cfg = compose(overrides)
    layout = ParallelLayout.from_config(cfg.parallelism, processes)
    plan = plan_stages(cfg.model.num_layers, cfg.parallelism)
    counted = count_parameters(cfg.model, VOCAB_SIZE)
    real = ranks.run(count_local_parameters, processes, overrides)
    for rank, found in enumerate(real):
        chunks = plan.chunks(layout.coordinates(rank)["pp"])
        assert sum(local_parameters(layout, chunks, counted, cfg.model.share_embeddings_and_output_weights)) == found
    if processes == 1:
        assert counted.total == real[0]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_activations_of_a_dense_layer(micro_batch_size: int, ranks: RankPool) -> None:
    """On CPU a norm keeps its normalised input too, and SwiGLU is not fused: two tensors of the inner width more."""
    overrides = ("model=gpt_tiny", f"trainer.micro_batch_size={micro_batch_size}", "data.seq_length=256")
    cfg = compose(overrides)
    tokens = micro_batch_size * 256
    unfused_on_cpu = tokens * 4 * (2 * cfg.model.hidden_size + 2 * cfg.model.ffn_hidden_size)
    (real,) = ranks.run(measure_layer_bytes, 1, overrides)
    assert layer_activations(cfg, 0, False).kept + unfused_on_cpu == pytest.approx(real, rel=0.015)
