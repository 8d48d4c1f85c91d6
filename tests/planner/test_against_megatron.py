"""The planner's arithmetic against real Megatron models on warm ranks."""

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.parallel.stages import plan_stages
from nemo_llm.planner.activations import layer_activations
from nemo_llm.planner.adapters import trained_parameters
from nemo_llm.planner.parameters import count_parameters
from nemo_llm.planner.state import local_parameters
from tests.parallel.rank_grid import RankGrid
from tests.planner.measure import count_local_parameters, count_trained_parameters, measure_layer_bytes
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
    layout = RankGrid.from_config(cfg.parallelism, processes)
    plan = plan_stages(cfg.model.num_layers, cfg.parallelism)
    counted = count_parameters(cfg.model, VOCAB_SIZE)
    real = ranks.run(count_local_parameters, processes, overrides)
    for rank, found in enumerate(real):
        chunks = plan.chunks(layout.coordinates(rank)["pp"])
        assert sum(local_parameters(layout, chunks, counted, cfg.model.share_embeddings_and_output_weights)) == found
    if processes == 1:
        assert counted.total == real[0]


CPU = "performance.fused_kernels=false"  # its rotation is not of one kernel with the split


@pytest.mark.parametrize(
    ("shape", "norms"),
    [
        ("trainer.micro_batch_size=1", 2),
        ("trainer.micro_batch_size=4", 2),
        ("trainer.micro_batch_size=2 model.norm_placement=both", 4),
        ("trainer.micro_batch_size=2 model.parallel_residual=true", 2),
        ("trainer.micro_batch_size=2 model.position_embedding_type=learned_absolute", 2),
        ("trainer.micro_batch_size=2 model.normalization=LayerNorm", 0),
        ("trainer.micro_batch_size=2 model.activation_func=gelu model.gated_linear_unit=false", 2),
    ],
)
def test_activations_of_a_dense_layer(shape: str, norms: int, ranks: RankPool) -> None:
    """On CPU an RMSNorm keeps its normalised input too, and SwiGLU is not fused: two more of the inner width."""
    overrides = ("model=gpt_tiny", "data.seq_length=256", CPU, *shape.split())
    cfg = compose(overrides)
    tokens = cfg.trainer.micro_batch_size * 256
    gated = cfg.model.gated_linear_unit
    unfused_on_cpu = tokens * 4 * (norms * cfg.model.hidden_size + (2 * cfg.model.ffn_hidden_size if gated else 0))
    (real,) = ranks.run(measure_layer_bytes, 1, overrides)
    assert layer_activations(cfg.model_setting, 0, False).kept + unfused_on_cpu == pytest.approx(real, rel=0.015)


ADAPTED = [
    ("model=gpt_tiny peft=lora", 1),
    ("model=gpt_tiny peft=lora peft.target_modules=[linear_q,linear_fc2] peft.ranks={linear_fc2:4}", 1),
    ("model=gpt_tiny peft=dora peft.target_modules=['decoder.layers.1.*'] parallelism=tp2", 2),
    ("model=gpt_tiny peft=ia3 peft.target_modules=[linear_k,linear_v,linear_fc2] parallelism=tp2", 2),
    ("model=gpt_tiny peft=adapter peft.target_modules=[linear_proj,linear_fc2] parallelism=pp2", 2),
    ("model=gpt_tiny peft=p_tuning", 1),
    ("model=gpt_tiny peft=prompt_tuning model.head=[a,b]", 1),
    ("model=moe_tiny peft=lora parallelism=ep2 model.moe.moe_shared_expert_intermediate_size=64", 2),
]


@pytest.mark.parametrize(("arguments", "processes"), ADAPTED, ids=[arguments for arguments, _ in ADAPTED])
def test_every_rank_trains_what_the_planner_counts(arguments: str, processes: int, ranks: RankPool) -> None:
    overrides = tuple(arguments.split())
    cfg = compose(overrides)
    layout = RankGrid.from_config(cfg.parallelism, processes)
    plan = plan_stages(cfg.model.num_layers, cfg.parallelism)
    for rank, found in enumerate(ranks.run(count_trained_parameters, processes, overrides)):
        chunks = plan.chunks(layout.coordinates(rank)["pp"])
        numbers = tuple(number for chunk in chunks for number in chunk.layers)
        assert trained_parameters(cfg.model_setting, layout, numbers) == found
