"""The memory estimate: exact where it can be, monotone where it should be, and a refusal that helps."""

import dataclasses
from functools import cache

import pytest

from nemo_llm.config import RunConfig
from nemo_llm.config.compose.load import compose
from nemo_llm.errors import ConfigError
from nemo_llm.planner.activations import boundary_bytes, layer_activations, layer_tensors, tokens_per_rank
from nemo_llm.planner.memory import (
    COMMUNICATOR_BYTES,
    CONTEXT_BYTES,
    GIB,
    RESERVE,
    chunk_bytes,
    logits_bytes,
    loss_bytes,
)
from nemo_llm.planner.parameters import count_parameters
from nemo_llm.training.check_only import check_card, estimate_run, report


@cache
def run(*arguments: str) -> RunConfig:
    return compose(list(arguments))


def peak(processes: int, *arguments: str) -> object:
    return estimate_run(run(*arguments), processes, 2048).peak


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
    # All moments are one window here, of which three are on their way.
    assert peak(1, *bf16, "performance.offload_optimizer_moments=true").optimizer == (4 + 3 * 8) * counted.total
    large = estimate_run(run("model=llama3_1b", "performance.offload_optimizer_moments=true"), 1, 128256)
    assert large.peak.optimizer == 4 * large.parameters.total + 3 * 2 * 4 * 2**25
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
    estimate = estimate_run(cfg, 2, 2048)
    total = estimate.parameters.total
    assert sum(stage.parameters for stage in estimate.stages) == 4 * (total + 2048 * 192)
    untied = run("model=gpt_tiny", "parallelism=pp2", "model.share_embeddings_and_output_weights=false")
    stages = estimate_run(untied, 2, 2048).stages
    assert sum(stage.parameters for stage in stages) == 4 * (total + 2048 * 192)
    assert [stage.moments["loss"] > stage.activations for stage in stages] == [False, True]


def test_experts_are_spread_over_expert_ranks() -> None:
    total = count_parameters(run("model=moe_tiny").model, 2048).total
    experts = 4 * 4 * 3 * 192 * 256
    spread = peak(2, "model=moe_tiny", "parallelism=ep2")
    assert spread.parameters == 4 * (total - experts / 2)
    # The dense part is sharded over both ranks; each expert has one copy, hence no ranks to be sharded over.
    assert spread.optimizer == 8 * ((total - experts) / 2 + experts / 2)


def test_first_stage_holds_the_most_micro_batches() -> None:
    arguments = ("model=gpt_tiny", "trainer.micro_batch_size=1", "model.num_layers=8")
    stages = estimate_run(run(*arguments, "parallelism=pp2"), 2, 2048).stages
    per_layer = layer_activations(run(*arguments).model_setting, 0, False).kept
    assert stages[1].activations == 4 * per_layer
    assert stages[0].activations == 2 * 4 * per_layer
    interleaved = estimate_run(run(*arguments, "parallelism=pp2_vp2"), 2, 2048).stages
    # 2 (pp - 1) + (vp - 1) pp + 1 = 5 chunk passes of two layers each ahead on the first stage.
    assert interleaved[0].activations == 5 / 2 * 4 * per_layer


def test_a_layers_activations_closed_form() -> None:
    """gpt_tiny, fp32: 10 heads of queries, keys and values and 6 of output; two inputs, two norms; a log-sum-exp a
    head; a cosine and a sine of a head's width."""
    cfg = run("model=gpt_tiny", "trainer.micro_batch_size=1")
    elements = (2 + 2) * 192 + (10 + 6) * 32 + 3 * 512 + 6 + 2 * 32
    assert layer_activations(cfg.model_setting, 0, False).kept == 128 * 4 * elements
    assert layer_activations(cfg.model_setting, 0, True).kept == 128 * 4 * 192
    apart = run("model=gpt_tiny", "trainer.micro_batch_size=1", "performance.fused_kernels=false")
    rotated = (
        layer_activations(apart.model_setting, 0, False).kept - layer_activations(cfg.model_setting, 0, False).kept
    )
    assert rotated == 128 * 4 * (8 + 2) * 32, "rotated queries and keys, and angles for each"


@pytest.mark.parametrize(
    ("processes", "smaller", "part"),
    [
        (1, ["trainer.micro_batch_size=4"], "activations"),
        (1, ["trainer.micro_batch_size=4"], "working"),
        (1, ["performance.cross_entropy_chunk_tokens=256"], "working"),
        (2, ["parallelism=cp2"], "activations"),
        (2, ["parallelism=tp2"], "activations"),
        (2, ["parallelism=tp2"], "working"),
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
    assert boundary_bytes(whole.model_setting) == 2 * boundary_bytes(split.model_setting)
    saved = (
        layer_activations(whole.model_setting, 0, False).kept - layer_activations(split.model_setting, 0, False).kept
    )
    assert saved == 4 * boundary_bytes(split.model_setting)


def test_logits_of_one_chunk_or_all_of_them() -> None:
    fused = run("model=gpt_tiny", "performance.cross_entropy_chunk_tokens=512")
    assert logits_bytes(fused.model_setting, 4096) == chunk_bytes(fused.model_setting, 4096) == 512 * 4096 * 4
    short = run("model=gpt_tiny", "trainer.micro_batch_size=1")
    assert logits_bytes(short.model_setting, 4096) == 2 * logits_bytes(short.model_setting, 2048) == 128 * 4096 * 4
    whole = run("model=gpt_tiny", "trainer.micro_batch_size=1", "performance.fused_linear_cross_entropy=false")
    assert logits_bytes(whole.model_setting, 4096) == 128 * 4096 * (4 + 4 + 4 + 4), (
        "padding of the vocabulary takes a copy"
    )
    half = run("model=gpt_tiny", "trainer.micro_batch_size=1", "precision=fp16", "model.vocab_size=4096")
    assert logits_bytes(half.model_setting, 4096) == 128 * 4096 * (2 + 4 + 4), "fp16 is never fused"
    capped = run("model=gpt_tiny", "precision=bf16", "model.final_logit_softcapping=30")
    assert logits_bytes(capped.model_setting, 4096) == 7 * chunk_bytes(capped.model_setting, 4096)
    head = run("model=gpt_tiny", "trainer.micro_batch_size=1", "model.head=[a,b]")
    assert loss_bytes(head.model_setting, 4096) < loss_bytes(short.model_setting, 4096)


def test_the_peak_is_the_largest_moment_and_not_their_sum() -> None:
    full = ["parallelism.recompute_granularity=full", "parallelism.recompute_method=uniform",
            "parallelism.recompute_num_layers=1"]  # fmt: skip
    long = peak(1, "model=gpt_tiny", "data.seq_length=1024", *full)
    assert long.moment == "backward"
    wide = peak(1, "model=gpt_tiny", "performance.fused_linear_cross_entropy=false")
    assert wide.moment == "loss"
    tiny = peak(1, "model=gpt_tiny", "optim=muon", "precision=bf16", "data.seq_length=8", "trainer.micro_batch_size=1")
    assert tiny.moment == "update"
    quantised = estimate_run(
        run("model=llama3_8b", "peft=lora", "peft.base_weights=nf4", "data.seq_length=64"), 1, 128256
    ).peak
    assert quantised.moment == "start", "the model is built whole before its weights become four bits"
    assert quantised.allocated == pytest.approx(2 * 8.03e9, rel=0.02)
    for memory in (long, wide, tiny, quantised):
        resident = memory.parameters + memory.gradients + memory.optimizer
        assert memory.allocated == pytest.approx(resident + memory.activations + memory.working)


def test_allowance_is_apart_and_grows_with_communicators() -> None:
    alone, four = peak(1, "model=gpt_tiny"), peak(4, "model=gpt_tiny", "parallelism=tp2_pp2")
    assert alone.allowance == pytest.approx(CONTEXT_BYTES + RESERVE * alone.allocated)
    assert four.allowance == pytest.approx(CONTEXT_BYTES + 2 * COMMUNICATOR_BYTES + RESERVE * four.allocated)
    assert alone.total == alone.allocated + alone.allowance


def test_dropout_and_fp8_cost_and_spare_memory() -> None:
    plain = peak(1, "model=gpt_tiny", "precision=bf16")
    assert peak(1, "model=gpt_tiny", "precision=bf16", "model.hidden_dropout=0.1").activations > plain.activations
    counted = count_parameters(run("model=gpt_tiny").model, 2048)
    in_layers = sum(layer.total for layer in counted.layers)
    matrices = sum(layer.split for layer in counted.layers)
    engine = peak(1, "model=gpt_tiny", "precision=fp8_delayed", "model.transformer_impl=transformer_engine")
    assert engine.parameters == plain.parameters + 2 * in_layers
    torch = peak(1, "model=gpt_tiny", "precision=fp8_tensorwise", "model.transformer_impl=torch")
    assert torch.parameters == plain.parameters
    assert torch.activations == engine.activations + matrices, "transposed FP8 weights are kept from pass to pass"
    assert engine.activations < plain.activations


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["model.norm_placement=both"], {"inputs of norms behind"}),
        (["model.qk_layernorm=true"], {"attention"}),
        (["model.activation_func=gelu"], {"MLP"}),
        (["performance.fused_kernels=false"], {"attention"}),
        (["data.reset_attention_mask=true", "data.reset_position_ids=true", "performance.flex_attention=false"],
         {"scores"}),
        (["model.window_size=16", "performance.flex_attention=false"], {"scores"}),
        (["model.attn_logit_softcapping=50", "performance.flex_attention=false"], {"scores"}),
        (["data.reset_attention_mask=true", "data.reset_position_ids=true"], set()),
        (["model.window_size=16"], set()),
    ],
)  # fmt: skip
def test_what_keeps_more_in_a_layer(more: list[str], names: set[str]) -> None:
    before, after = (layer_tensors(run("model=gpt_tiny", *options).model_setting, 0) for options in ([], more))
    assert {name for name in before if after[name] > before[name]} == names
    assert all(after[name] >= size for name, size in before.items())


def test_context_parallel_exchanges_cost_a_copy_of_the_output_or_the_keys_of_all() -> None:
    plain, exchanged, gathered = (
        layer_tensors(run("model=gpt_tiny", *options).model_setting, 0)["attention"]
        / tokens_per_rank(run("model=gpt_tiny", *options).model_setting)
        for options in ([], ["parallelism=cp2"], ["parallelism=cp2", "parallelism.cp_comm_type=all_gather"])
    )
    angles = 2 * 32 * 4 / 8  # by position, which eight samples share
    assert exchanged - plain == 6 * 32 * 4
    assert gathered - exchanged == 2 * 2 * 32 * 4
    assert plain == (10 + 6) * 32 * 4 + angles


def test_a_frozen_layer_keeps_no_inputs_and_an_adapter_does() -> None:
    options = ("model=gpt_tiny", "peft=lora")
    trained = layer_tensors(run("model=gpt_tiny").model_setting, 0)
    everywhere = layer_tensors(run(*options).model_setting, 0)
    assert everywhere["normed inputs"] == trained["normed inputs"]
    some = layer_tensors(run(*options, "peft.target_modules=[linear_q]").model_setting, 0)
    assert some["normed inputs"] == trained["normed inputs"] / 2
    assert some["input of the second matrix"] == 0.0
    prompts = layer_tensors(run("model=gpt_tiny", "peft=prompt_tuning").model_setting, 0)
    assert prompts["normed inputs"] == prompts["input of the second matrix"] == prompts["adapters"] == 0.0
    upper = run(*options, "peft.target_modules=['decoder.layers.3.*']")
    assert (
        layer_tensors(upper.model_setting, 2)["normed inputs"]
        == 0.0
        < layer_tensors(upper.model_setting, 3)["normed inputs"]
    )


def test_experts_keep_more_activations_than_a_dense_layer_of_their_width() -> None:
    assert (
        layer_activations(run("model=moe_tiny", "model.moe.moe_grouped_gemm=false").model_setting, 0, False).kept
        > layer_activations(run("model=gpt_tiny").model_setting, 0, False).kept
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
    cfg = run("model=llama3_8b", "cluster=h100", "parallelism=cp2", "trainer.micro_batch_size=2")
    with pytest.raises(ConfigError) as caught:
        report(cfg, 8, 50257)
    (problem,) = caught.value.problems
    assert problem.key == "cluster.gpu_memory_gib"
    assert problem.value == 79.1
    assert "activations" in problem.rule
    assert "set trainer.micro_batch_size=1" in problem.fix
    assert "recompute_modules=[mlp]" in problem.fix
    assert "estimated memory per rank" in str(caught.value)
    smaller = dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, micro_batch_size=1))
    needed = estimate_run(smaller, 8, 128256).peak.total / GIB
    assert f"({needed:.1f} GiB)" in problem.fix
    assert needed <= 79.1


def test_a_run_at_the_edge_is_let_through_with_a_word() -> None:
    cfg = run("model=gpt_1b", "precision=bf16", "model.transformer_impl=torch", "trainer.micro_batch_size=18",
              "trainer.global_batch_size=18")  # fmt: skip
    memory = estimate_run(cfg, 1, 50304).peak
    between = (memory.least + memory.total) / 2 / GIB
    warning = check_card(cfg, 1, 50257, ("NVIDIA H100 80GB HBM3", between))
    assert warning is not None
    assert "may not fit; set trainer.micro_batch_size=9" in warning
    assert check_card(cfg, 1, 50257, ("NVIDIA H100 80GB HBM3", memory.total / GIB + 0.1)) is None
    with pytest.raises(ConfigError, match=r"the run needs about .* GiB per GPU") as caught:
        check_card(cfg, 1, 50257, ("NVIDIA H100 80GB HBM3", memory.least / GIB - 0.1))
    assert "trainer.check_memory=false" in caught.value.problems[0].fix
    assert "estimated memory per rank" in str(caught.value)


def test_layers_of_the_users_own_are_not_judged() -> None:
    cfg = run("model=gpt_175b", "model.layer_spec='package:function'")
    assert check_card(cfg, 1, 50257, ("card", 1.0)) is None


def test_a_hopeless_run_is_told_so() -> None:
    with pytest.raises(ConfigError, match="no single change is enough") as caught:
        report(run("model=gpt_175b", "cluster=h100", "parallelism=tp8"), 8, 50257)
    assert "use more processes" in str(caught.value)


def test_unknown_gpu_refuses_nothing() -> None:
    assert "choose cluster=<name>" in report(run("model=gpt_175b", "parallelism=tp8"), 8, 50257)


def test_frozen_weights_need_neither_gradients_nor_optimizer_state() -> None:
    whole = estimate_run(run("model=llama3_8b", "precision=bf16"), 1, 128256).peak
    adapted = estimate_run(run("model=llama3_8b", "precision=bf16", "peft=lora"), 1, 128256).peak
    trained = adapted.gradients / 4
    # Rank 16 on all seven linear layers of 32 layers.
    assert trained == 32 * 16 * (3 * 4096 + 6144 + 2 * 4096 + 2 * (4096 + 14336) + 14336 + 4096)
    assert adapted.parameters == whole.parameters + 2 * trained
    assert adapted.optimizer == 12 * trained
    quantised = estimate_run(
        run("model=llama3_8b", "precision=bf16", "peft=lora", "peft.base_weights=nf4"), 1, 128256
    ).peak
    assert quantised.parameters == pytest.approx(5.39 * GIB, rel=0.01)
