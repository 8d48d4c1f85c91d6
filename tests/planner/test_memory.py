"""The memory estimate: exact where it can be, monotone where it should be, and a refusal that helps."""

import dataclasses
from functools import cache

import pytest

from nemo_llm.config import RunConfig
from nemo_llm.config.load import compose
from nemo_llm.errors import ConfigError
from nemo_llm.planner.activations import boundary_bytes, layer_activations, logits_bytes
from nemo_llm.planner.check_only import report
from nemo_llm.planner.memory import GIB, estimate_memory
from nemo_llm.planner.parameters import count_parameters


@cache
def run(*arguments: str) -> RunConfig:
    return compose(list(arguments))


def peak(processes: int, *arguments: str) -> object:
    return estimate_memory(run(*arguments), processes, 2048).peak


def test_states_of_one_process() -> None:
    total = count_parameters(run("model=gpt_tiny").model, 2048).total
    single = peak(1, "model=gpt_tiny", "precision=bf16")
    assert (single.parameters, single.gradients, single.optimizer) == (2 * total, 4 * total, 12 * total)
    full = peak(1, "model=gpt_tiny", "precision=fp32")
    assert (full.parameters, full.gradients, full.optimizer) == (4 * total, 4 * total, 8 * total)
    narrow = peak(1, "model=gpt_tiny", "precision=bf16", "precision.grad_reduce_in_fp32=false")
    assert narrow.gradients == 2 * total


def test_state_that_muon_and_host_memory_spare() -> None:
    counted = count_parameters(run("model=gpt_tiny").model, 2048)
    outside = counted.total - sum(layer.total for layer in counted.layers)
    bf16 = ("model=gpt_tiny", "precision=bf16")
    assert peak(1, *bf16, "performance.offload_optimizer_moments=true").optimizer == 4 * counted.total
    assert peak(1, *bf16, "optim=muon").optimizer == 8 * counted.total + 4 * outside
    kept = [peak(1, *bf16, f"performance.offload_activation_layers={count}").activations for count in (0, 1, 2, 3, 9)]
    assert kept == sorted(kept, reverse=True)
    assert kept[3] == kept[4] < kept[0], "all but one layer at most"


def test_distributed_optimizer_shards_over_data_and_context_ranks() -> None:
    total = count_parameters(run("model=gpt_tiny").model, 2048).total
    assert peak(4, "model=gpt_tiny", "parallelism=dp").optimizer == 8 * total / 4
    assert peak(4, "model=gpt_tiny", "parallelism=cp2").optimizer == 8 * total / 4
    assert peak(4, "model=gpt_tiny").optimizer == 8 * total


def test_tensor_parallel_ranks_hold_a_half_and_the_norms() -> None:
    counted = count_parameters(run("model=gpt_tiny").model, 2048)
    norms = (2 * 4 + 1) * 192
    assert peak(2, "model=gpt_tiny", "parallelism=tp2").parameters == 4 * ((counted.total - norms) / 2 + norms)


def test_pipeline_stages_add_up_to_the_model_and_one_tied_copy() -> None:
    cfg = run("model=gpt_tiny", "parallelism=pp2")
    estimate = estimate_memory(cfg, 2, 2048)
    total = estimate.parameters.total
    assert sum(stage.parameters for stage in estimate.stages) == 4 * (total + 2048 * 192)
    untied = run("model=gpt_tiny", "parallelism=pp2", "model.share_embeddings_and_output_weights=false")
    stages = estimate_memory(untied, 2, 2048).stages
    assert sum(stage.parameters for stage in stages) == 4 * (total + 2048 * 192)
    assert [stage.logits > 0 for stage in stages] == [False, True]


def test_experts_are_spread_over_expert_ranks() -> None:
    total = count_parameters(run("model=moe_tiny").model, 2048).total
    experts = 4 * 4 * 3 * 192 * 256
    spread = peak(2, "model=moe_tiny", "parallelism=ep2")
    assert spread.parameters == 4 * (total - experts / 2)
    # The dense part is sharded over both ranks; each expert has one copy, hence no ranks to be sharded over.
    assert spread.optimizer == 8 * ((total - experts) / 2 + experts / 2)


def test_first_stage_holds_the_most_micro_batches() -> None:
    arguments = ("model=gpt_tiny", "trainer.micro_batch_size=1", "model.num_layers=8")
    stages = estimate_memory(run(*arguments, "parallelism=pp2"), 2, 2048).stages
    per_layer = layer_activations(run(*arguments), 0, False).kept
    assert stages[1].activations == 4 * per_layer
    assert stages[0].activations == 2 * (4 * per_layer + boundary_bytes(run(*arguments)))
    interleaved = estimate_memory(run(*arguments, "parallelism=pp2_vp2"), 2, 2048).stages
    # 2 (pp - 1) + (vp - 1) pp + 1 = 5 chunk passes of two layers each ahead on the first stage.
    assert interleaved[0].activations == 5 / 2 * (4 * per_layer + boundary_bytes(run(*arguments)))


def test_a_layers_activations_closed_form() -> None:
    """gpt_tiny, fp32: 10 heads of queries, keys and values, 8 rotated ones, 6 of output; two inputs, two norms; and
    two cosines and sines of a head's width."""
    cfg = run("model=gpt_tiny", "trainer.micro_batch_size=1")
    elements = (2 + 2) * 192 + (10 + 8 + 6) * 32 + 3 * 512 + 6 + 4 * 32
    assert layer_activations(cfg, 0, False).kept == 128 * 4 * elements
    assert layer_activations(cfg, 0, True).kept == 128 * 4 * 192


@pytest.mark.parametrize(
    ("processes", "smaller", "part"),
    [
        (1, ["trainer.micro_batch_size=4"], "activations"),
        (1, ["trainer.micro_batch_size=4"], "logits"),
        (2, ["parallelism=cp2"], "activations"),
        (2, ["parallelism=tp2"], "activations"),
        (2, ["parallelism=tp2"], "logits"),
        (1, ["parallelism.recompute_granularity=selective", "parallelism.recompute_modules=[mlp]"], "activations"),
        (1, ["parallelism.recompute_granularity=selective",
             "parallelism.recompute_modules=[layernorm]"], "activations"),
        (1, ["parallelism.recompute_granularity=full", "parallelism.recompute_method=uniform",
             "parallelism.recompute_num_layers=1"], "activations"),
        (1, ["parallelism.recompute_granularity=full", "parallelism.recompute_method=block",
             "parallelism.recompute_num_layers=2"], "activations"),
        (1, ["data.seq_length=64"], "activations"),
    ],
)  # fmt: skip
def test_what_is_said_to_save_memory_does(processes: int, smaller: list[str], part: str) -> None:
    before = peak(processes, "model=gpt_tiny").parts()[part]
    assert peak(processes, "model=gpt_tiny", *smaller).parts()[part] < before


def test_sequence_parallelism_splits_what_tensor_parallelism_leaves() -> None:
    arguments = ("model=gpt_tiny", "parallelism=tp2")
    split = run(*arguments)
    whole = run(*arguments, "parallelism.sequence_parallel=false")
    assert boundary_bytes(whole) == 2 * boundary_bytes(split)
    saved = layer_activations(whole, 0, False).kept - layer_activations(split, 0, False).kept
    assert saved == 4 * boundary_bytes(split)


def test_logits_grow_with_the_vocabulary() -> None:
    cfg = run("model=gpt_tiny", "trainer.micro_batch_size=1")
    assert logits_bytes(cfg, 4096) == 2 * logits_bytes(cfg, 2048) == 128 * 4096 * 12


def test_dropout_and_fp8_cost_memory() -> None:
    plain = peak(1, "model=gpt_tiny", "precision=bf16")
    assert peak(1, "model=gpt_tiny", "precision=bf16", "model.hidden_dropout=0.1").activations > plain.activations
    assert peak(1, "model=gpt_tiny", "precision=fp8_delayed").parameters == 2 * plain.parameters


def test_experts_keep_more_activations_than_a_dense_layer_of_their_width() -> None:
    assert (
        layer_activations(run("model=moe_tiny"), 0, False).kept
        > layer_activations(run("model=gpt_tiny"), 0, False).kept
    )


def test_large_models_fit_the_gpus_that_their_files_name() -> None:
    for model, parallelism, processes in [
        ("gpt_1b", "single", 1),
        ("gpt_5b", "dp", 8),
        ("gpt_7b", "tp2", 8),
        ("gpt_20b", "tp4", 32),
        ("gpt_175b", "tp8_pp8_vp6", 128),
        ("llama3_1b", "single", 1),
        ("llama3_8b", "tp2", 8),
    ]:
        text = report(run(f"model={model}", f"parallelism={parallelism}", "cluster=h100"), processes, 50257)
        assert "of the 79.1 GiB of H100" in text, model


def test_report_shows_layout_stages_counts_and_memory() -> None:
    text = report(run("model=gpt_tiny", "parallelism=pp2"), 2, 2048)
    for wanted in ("1.97 million parameters", "2 processes: PP 2 x DP 1", "embedding + 0-1", "2-3 + loss",
                   "activations", "choose cluster=<name>"):  # fmt: skip
        assert wanted in text


def test_too_large_a_run_is_refused_with_changes_that_fit() -> None:
    cfg = run("model=llama3_8b", "cluster=h100", "parallelism=cp2")
    with pytest.raises(ConfigError) as caught:
        report(cfg, 8, 50257)
    (problem,) = caught.value.problems
    assert problem.key == "cluster.gpu_memory_gib"
    assert problem.value == 79.1
    assert "gradients" in problem.rule
    assert "recompute_granularity=selective" in problem.fix
    assert "estimated memory per rank" in str(caught.value)
    changed = dataclasses.replace(
        cfg.parallelism, recompute_granularity="selective", recompute_modules=["mlp", "layernorm"]
    )
    needed = estimate_memory(dataclasses.replace(cfg, parallelism=changed), 8, 128256).peak.total / GIB
    assert f"({needed:.1f} GiB)" in problem.fix
    assert needed <= 79.1


def test_a_hopeless_run_is_told_so() -> None:
    with pytest.raises(ConfigError, match="no single change is enough") as caught:
        report(run("model=gpt_175b", "cluster=h100", "parallelism=tp8"), 8, 50257)
    assert "use more processes" in str(caught.value)


def test_unknown_gpu_refuses_nothing() -> None:
    assert "choose cluster=<name>" in report(run("model=gpt_175b", "parallelism=tp8"), 8, 50257)


def test_frozen_weights_need_neither_gradients_nor_optimizer_state() -> None:
    whole = estimate_memory(run("model=llama3_8b", "precision=bf16"), 1, 128256).peak
    adapted = estimate_memory(run("model=llama3_8b", "precision=bf16", "peft=lora"), 1, 128256).peak
    assert adapted.parameters == whole.parameters
    trained = adapted.gradients / 4
    assert adapted.optimizer == 12 * trained
    # Rank 16 on all seven linear layers of 32 layers: 41.9 million parameters.
    assert trained == pytest.approx(41.9e6, rel=0.2)
