"""Nothing of a foreign configuration goes missing: unknown keys are unmapped, defaults and schedules are those of the
other project, held against Megatron-Core's and NeMo's own code where that is installed.
"""

import random
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import InputError
from nemo_llm.migrate.arguments import mentions
from nemo_llm.migrate.configs import import_file, import_nemo_model, model_file
from nemo_llm.migrate.rows import Imported

SHORT = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --lr 6e-4 "
)
NEMO_MODEL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "encoder_seq_length": 64,
    "max_position_embeddings": 64, "micro_batch_size": 1, "global_batch_size": 8,
}  # fmt: skip


def imported(tmp_path: Path, text: str, name: str = "train.sh") -> tuple[Imported, RunConfig]:
    (tmp_path / name).write_text(text)
    result = import_file(tmp_path / name, "auto")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "mine.yaml").write_text(model_file(result, "mine", name))
    return result, compose(["+model=mine"], tmp_path)


def nemo_yaml(model: dict[str, Any], trainer: dict[str, Any] | None = None) -> str:
    import yaml

    return yaml.safe_dump({"trainer": {"max_steps": 1000, **(trainer or {})}, "model": {**NEMO_MODEL, **model}})


def became(result: Imported) -> dict[str, str]:
    return {row.key: row.became for row in result.rows}


# Defaults of Megatron-LM (megatron/training/arguments.py of core 0.15), restated by our names.
MEGATRON_SAYS_NOTHING = {
    "optim.weight_decay": 0.01, "optim.adam_beta1": 0.9, "optim.adam_beta2": 0.999, "optim.adam_eps": 1e-8,
    "optim.clip_grad": 1.0, "optim.sched.name": "linear", "optim.sched.warmup_steps": 0, "optim.sched.min_lr": 0.0,
    "optim.sched.decay_steps": 500, "trainer.max_steps": 500, "trainer.seed": 1234, "trainer.val_interval": 1000,
    "trainer.val_steps": 100, "trainer.log_interval": 100, "precision.name": "fp32", "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1, "model.normalization": "LayerNorm", "model.layernorm_epsilon": 1e-5,
    "model.position_embedding_type": "learned_absolute", "model.rotary_base": 10000.0, "model.rotary_percent": 1.0,
    "model.init_method_std": 0.02, "model.make_vocab_size_divisible_by": 128, "model.add_bias_linear": True,
    "model.add_qkv_bias": True, "model.share_embeddings_and_output_weights": True, "model.activation_func": "gelu_tanh",
    "model.gated_linear_unit": False, "model.ffn_hidden_size": 1024, "model.num_query_groups": 4,
    "model.vocab_size": None, "model.moe": None, "parallelism.use_distributed_optimizer": False,
}  # fmt: skip


def test_what_megatron_takes_where_a_script_says_nothing(tmp_path: Path) -> None:
    result, cfg = imported(tmp_path, f"{SHORT} --global-batch-size 8 --train-iters 500")
    for key, value in MEGATRON_SAYS_NOTHING.items():
        found: Any = cfg
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert {row.became for row in result.rows} == {"mapped", "default"}
    for key in ("lr-decay-style", "lr-decay-iters", "lr-warmup-iters", "min-lr", "adam-beta2", "weight-decay", "bf16"):
        assert became(result)[key] == "default", key


@pytest.mark.parametrize(
    ("more", "key", "value"),
    [
        ("--swiglu", "model.ffn_hidden_size", 640),  # int(4 x 256 x 2 / 3 / 64) x 64
        ("--no-bias-gelu-fusion", "model.activation_func", "gelu"),
        ("--disable-bias-linear", "model.activation_func", "gelu"),
        ("--num-query-groups 2", "model.num_query_groups", 4),  # read beside --group-query-attention alone
        ("--group-query-attention --num-query-groups 2", "model.num_query_groups", 2),
        ("--group-query-attention", "model.num_query_groups", 1),
        ("--use-rotary-position-embeddings", "model.position_embedding_type", "rope"),
        ("--rotary-seq-len-interpolation-factor 4", "model.rope_scaling.factor", 4.0),
        ("--use-rope-scaling", "model.rope_scaling.factor", 8.0),
        ("--use-rope-scaling --rope-scaling-factor 32", "model.rope_scaling.factor", 32.0),
        ("--use-rope-scaling", "model.rope_scaling.original_max_position_embeddings", 8192),
        ("--window-size 127,0", "model.window_size", 128),
        ("--fp16", "precision.grad_reduce_in_fp32", False),
        ("--bf16", "precision.grad_reduce_in_fp32", True),
        ("--bf16 --fp8-format hybrid", "precision.fp8.fp8_amax_history_len", 1),
        ("--bf16 --fp8-format e4m3 --fp8-recipe tensorwise", "precision.name", "fp8_tensorwise"),
        ("--num-experts 4", "model.moe.moe_aux_loss_coeff", 0.0),
        ("--num-experts 4", "model.moe.moe_token_dispatcher_type", "allgather"),
        ("--num-experts 4 --ffn-hidden-size 96", "model.moe.moe_ffn_hidden_size", 96),
        ("--eval-iters 0", "trainer.val_interval", None),
        ("--data-path /a", "data.split", "969,30,1"),
        ("--context-parallel-size 2", "parallelism.cp_comm_type", "p2p"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
         "parallelism.virtual_pipeline_model_parallel_size", 2),
        ("--lr-warmup-fraction 0.01", "optim.sched.warmup_steps", 5),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 100", "optim.sched.wsd_decay_style", "exponential"),
    ],
)  # fmt: skip
def test_arguments_that_megatron_reads_together(tmp_path: Path, more: str, key: str, value: Any) -> None:
    result, cfg = imported(tmp_path, f"{SHORT} --global-batch-size 8 --train-iters 500 {more}")
    found: Any = cfg
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert "unmapped" not in became(result).values()


@pytest.mark.parametrize(
    "argument",
    [
        "--no-rope-freq 4", "--lr-decay-style inverse-square-root", "--decoupled-lr 1e-4", "--lr-warmup-init 1e-6",
        "--fp32-residual-connection", "--optimizer sgd", "--embedding-init-method-std 1.0", "--rotary-interleaved",
        "--quick-geglu", "--position-embedding-type relative", "--multi-latent-attention", "--mtp-num-layers 1",
        "--moe-layer-freq ([0]*1+[1]*3)", "--softmax-type learnable", "--weight-decay-incr-style cosine",
        "--apply-residual-connection-post-layernorm", "--init-method-xavier-uniform", "--dataloader-type cyclic",
        "--moe-expert-capacity-factor 1.0", "--save-something-new 3", "--log-a-thing-of-tomorrow",
        "--fp8-format hybrid", "--no-thing-of-tomorrow", "--use-legacy-models", "--loss-scale 1024",
        "--exit-interval 100", "--sft", "--lr-warmup-samples 100", "--seed $SEED", "--skip-train",
        "--window-size 128,128",
        "--use-rope-scaling --rotary-seq-len-interpolation-factor 2",
    ],
)  # fmt: skip
def test_arguments_without_a_counterpart_are_unmapped(tmp_path: Path, argument: str) -> None:
    (tmp_path / "a.sh").write_text(f"{SHORT} --global-batch-size 8 --train-iters 500 {argument}")
    assert "unmapped" in became(import_file(tmp_path / "a.sh", "auto")).values()


def test_an_argument_given_twice_is_never_silent(tmp_path: Path) -> None:
    result, cfg = imported(tmp_path, f"{SHORT} --global-batch-size 8 --train-iters 500 --lr 1e-5")
    assert cfg.optim.lr == 6e-4
    assert [row.value for row in result.rows if row.became == "unmapped"] == [1e-5]


def _megatron_rates(cfg: RunConfig, samples: dict[str, float], consumed: list[int]) -> list[float]:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    sched = cfg.optim.sched
    own = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=cfg.optim.lr, min_lr=sched.min_lr, lr_warmup_steps=samples["warmup"],
        lr_decay_steps=samples["decay"], lr_decay_style="WSD" if sched.name == "wsd" else sched.name, start_wd=0.0,
        end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant", use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=samples.get("wsd"), lr_wsd_decay_style=sched.wsd_decay_style,
    )  # fmt: skip
    rates = []
    for before, after in pairwise([0, *consumed]):
        own.step(after - before)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("style", "more", "samples"),
    [
        ("linear", "", {"warmup": 0, "decay": 4000}),
        ("cosine", "--lr-warmup-iters 40 --lr-decay-iters 400 --min-lr 6e-5", {"warmup": 320, "decay": 3200}),
        ("constant", "--lr-warmup-fraction 0.1", {"warmup": 400, "decay": 4000}),
        ("WSD", "--lr-wsd-decay-iters 100 --lr-wsd-decay-style cosine", {"warmup": 0, "decay": 4000, "wsd": 800}),
        ("WSD", "--lr-wsd-decay-iters 99", {"warmup": 0, "decay": 4000, "wsd": 792}),
    ],
)
def test_rates_are_those_of_megatrons_scheduler(
    tmp_path: Path, style: str, more: str, samples: dict[str, float]
) -> None:
    from nemo_llm.config.sections.optim import learning_rate

    text = f"{SHORT} --global-batch-size 8 --train-iters 500 --lr-decay-style {style} {more}"
    cfg = imported(tmp_path, text)[1]
    expected = _megatron_rates(cfg, samples, [8 * step for step in range(1, 501)])
    found = [learning_rate(step, cfg.optim.lr, cfg.optim.sched) for step in range(1, 501)]
    assert found == pytest.approx(expected, abs=1e-12)


def _megatron_steps(samples: int, batch: int, ramp: tuple[int, int, int]) -> list[int]:
    """Samples consumed after each step, for `training.update_train_iters` of Megatron-LM with Megatron-Core's sizes."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    sizes = RampupBatchsizeNumMicroBatchesCalculator(batch, 1, 1, False, 1, *ramp)
    consumed = [0]
    while consumed[-1] <= ramp[2] and consumed[-1] <= samples:
        sizes.update(consumed[-1], False)
        consumed.append(consumed[-1] + sizes.get_current_global_batch_size())
    steps = max(0, (samples - consumed[-1]) // batch)
    return [*consumed, *(consumed[-1] + batch * step for step in range(1, steps + 1))]


def _reached(consumed: list[int], samples: int) -> int:
    return next(step for step, total in enumerate(consumed) if total >= samples)


@pytest.mark.parametrize("seed", range(6))
def test_samples_become_the_steps_of_megatrons_ramp(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    increment, stages = draw.choice((2, 4)), draw.randint(1, 5)
    ramp = (increment, increment, draw.randint(50, 2000))
    batch, total = increment * (stages + 1), draw.randint(1500, 9000)
    consumed = _megatron_steps(total, batch, ramp)
    decay = draw.randint(1000, consumed[-1])
    warmup = draw.randint(1, decay // 2)
    text = (
        f"{SHORT} --global-batch-size {batch} --rampup-batch-size {ramp[0]} {ramp[1]} {ramp[2]} "
        f"--train-samples {total} "
        f"--lr-warmup-samples {warmup} --lr-decay-samples {decay}"
    )
    result, cfg = imported(tmp_path, text)
    assert cfg.trainer.max_steps == len(consumed) - 1
    sched = cfg.optim.sched
    assert (sched.warmup_steps, sched.decay_steps) == (_reached(consumed, warmup), _reached(consumed, decay))
    assert became(result)["train-samples"] == "mapped"


def test_a_rate_that_follows_samples_through_a_ramp_is_said(tmp_path: Path) -> None:
    text = f"{SHORT} --global-batch-size 1536 --rampup-batch-size 32 32 5859375 --train-samples 244140625 "
    result, cfg = imported(tmp_path, f"{text} --lr-warmup-samples 406250 --lr-decay-samples 200000000")
    sched = cfg.optim.sched
    assert (cfg.trainer.max_steps, sched.warmup_steps, sched.decay_steps) == (172422, 7395, 143685)
    (row,) = [row for row in result.rows if row.became == "unmapped"]
    assert "follows samples" in row.text


@pytest.mark.parametrize(
    "sched",
    [
        {"name": "CosineAnnealing", "min_lr": 1e-5},
        {"name": "CosineAnnealing", "warmup_steps": 50, "min_lr": 1e-5},
        {"name": "CosineAnnealing", "warmup_ratio": 0.1, "min_lr": 0.0, "constant_steps": 0},
        {"name": "CosineAnnealing", "warmup_steps": 50, "constant_steps": 300, "min_lr": 1e-5},
        {"name": "CosineAnnealing", "warmup_steps": 50, "constant_ratio": 0.2, "min_lr": 1e-5},
        {"name": "CosineAnnealing", "warmup_steps": 50, "max_steps": 700, "min_lr": 1e-5},
        {"name": "WarmupAnnealing", "warmup_steps": 50, "min_lr": 1e-5},
        {"name": "WarmupAnnealing", "warmup_ratio": 0.05},
    ],
)
def test_rates_are_those_of_nemos_schedulers(tmp_path: Path, sched: dict[str, Any]) -> None:
    import torch
    from nemo.core.optim import lr_scheduler

    from nemo_llm.config.sections.optim import learning_rate

    result, cfg = imported(tmp_path, nemo_yaml({"optim": {"lr": 1e-3, "sched": sched}}), "a.yaml")
    assert "unmapped" not in became(result).values()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    settings = {"max_steps": 1000, "min_lr": 0.0, **sched}
    own = getattr(lr_scheduler, settings.pop("name"))(optimizer, **settings)
    expected = []
    for _ in range(1001):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        own.step()
    # With constant steps NeMo's warm-up begins at 0, which ours leaves out.
    first = 1 if sched.get("constant_steps") or "constant_ratio" in sched else 0
    last = sched.get("max_steps", 1000) + first
    found = [learning_rate(step, 1e-3, cfg.optim.sched) for step in range(1, last)]
    assert found == pytest.approx(expected[first : first + len(found)], abs=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        {"optim": {"lr": 1e-3, "sched": {"name": "CosineAnnealing", "hold_steps": 10}}},
        {"optim": {"lr": 1e-3, "sched": {"name": "PolynomialDecayAnnealing", "warmup_steps": 10}}},
        {"optim": {"lr": 1e-3, "sched": {"name": "WarmupAnnealing", "constant_steps": 10}}},
        {"optim": {"lr": 1e-3, "sched": {"name": "CosineAnnealing", "warmup_steps": 100, "constant_steps": 950}}},
        {"optim": {"lr": 1e-3, "sched": {"name": "CosineAnnealing", "max_steps_for_lr_sched": 10}}},
        {"transformer_block_type": "post_ln"}, {"head_scale": True}, {"headscale": True}, {"my_unknown_thing": 7},
        {"normalize_attention_scores": False}, {"openai_gelu": True}, {"fp8": True}, {"rotary_interleaved": True},
        {"mcore_customization_config": {"parallel_attention": True}}, {"moe_expert_capacity_factor": 1.0},
        {"position_embedding_type": "alibi"}, {"data": {"add_fim": True}},
        {"data": {"data_prefix": {"train": [1, "a"]}}},
        {"activation": "reglu"}, {"multi_query_attention": True}, {"optim": {"lr": 1e-3, "name": "adafactor"}},
        {"peft": {"peft_scheme": "lora"}}, {"apply_embedding_scaling": True},
    ],
)  # fmt: skip
def test_keys_of_nemo_without_a_counterpart_are_unmapped(tmp_path: Path, model: dict[str, Any]) -> None:
    (tmp_path / "a.yaml").write_text(nemo_yaml(model))
    assert "unmapped" in became(import_file(tmp_path / "a.yaml", "auto")).values()


@pytest.mark.parametrize(
    "trainer", [{"accumulate_grad_batches": 4}, {"max_epochs": 3}, {"limit_train_batches": 200}, {"of_tomorrow": 1}]
)
def test_keys_of_the_trainer_without_a_counterpart_are_unmapped(tmp_path: Path, trainer: dict[str, Any]) -> None:
    (tmp_path / "a.yaml").write_text(nemo_yaml({}, trainer))
    assert "unmapped" in became(import_file(tmp_path / "a.yaml", "auto")).values()


def test_keys_of_nemo_that_have_a_counterpart(tmp_path: Path) -> None:
    model = {
        "seq_len_interpolation_factor": 8, "position_embedding_type": "rope", "optim": {"lr": 1e-3, "eps": 1e-6},
        "bias_activation_fusion": False,
    }  # fmt: skip
    result, cfg = imported(tmp_path, nemo_yaml(model), "a.yaml")
    assert cfg.model.rope_scaling is not None
    assert (cfg.model.rope_scaling.type, cfg.model.rope_scaling.factor) == ("linear", 8.0)
    assert (cfg.optim.adam_eps, cfg.optim.sched.name, cfg.model.activation_func) == (1e-6, "constant", "gelu")
    assert (cfg.model.hidden_dropout, cfg.optim.adam_beta2, cfg.optim.clip_grad) == (0.1, 0.999, 0.0)
    assert cfg.data.seq_length == 64
    assert "unmapped" not in became(result).values()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformer_block_type", "post_ln"), ("headscale", True), ("normalize_attention_scores", False),
        ("my_unknown_thing", 7), ("rotary_interleaved", True), ("apply_embedding_scaling", True), ("peft", {"a": 1}),
        ("position_embedding_type", "alibi"), ("activation", "reglu"), ("moe_expert_capacity_factor", 1.0),
    ],
)  # fmt: skip
def test_an_archive_with_a_key_that_changes_the_model_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    import yaml

    plain = {**NEMO_MODEL, "optim": {"lr": 1e-3, "of_tomorrow": 1}, "data": {"x": 1}, "precision": "bf16", "a": None}
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.safe_dump(plain))
    assert import_nemo_model(path)["num_layers"] == 2
    path.write_text(yaml.safe_dump({**plain, key: value}))
    with pytest.raises(InputError, match=f"model.{key}"):
        import_nemo_model(path)


def test_an_archive_with_scaled_positions(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "model_config.yaml"
    rope = {**NEMO_MODEL, "position_embedding_type": "rope"}
    path.write_text(yaml.safe_dump({**rope, "seq_len_interpolation_factor": 8}))
    assert import_nemo_model(path)["rope_scaling"] == {"type": "linear", "factor": 8.0}
    path.write_text(yaml.safe_dump({**rope, "scale_positional_embedding": True}))
    assert import_nemo_model(path)["rope_scaling"]["type"] == "llama3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchrun --nproc_per_node 8 pretrain_gpt.py --bf16 --lr=1e-4",
         {"nproc-per-node": 8, "bf16": True, "lr": 1e-4}),
        ("ARGS=(--num-layers 32 --hidden-size 64\n  --bf16)\nT=(--seed 1 --swiglu)",
         {"num-layers": 32, "hidden-size": 64, "bf16": True, "seed": 1, "swiglu": True}),
        ("torchrun --standalone pretrain_gpt.py --bf16 2>&1 | tee log.txt", {"standalone": True, "bf16": True}),
        ('GPT="\n  --num-layers 24 \\\n  --data-path 0.5 /a 0.5 /b \\\n"\nGPT="$GPT --seed 3"\npython x.py $GPT --fp16',
         {"num-layers": 24, "data-path": [0.5, "/a", 0.5, "/b"], "seed": 3, "fp16": True}),
        ("# don't\necho it's\nexport L=4\nA=1 python x.py --num-layers $L \\\r\n  --seed ${S:-7};",
         {"num-layers": 4, "seed": 7}),
        ("if x; then\n  A=(--seed 1)\nfi\npython x.py --window-size '(127,0)' --rampup-batch-size 1 2 3 -x",
         {"seed": 1, "window-size": "(127,0)", "rampup-batch-size": [1, 2, 3]}),
    ],
)  # fmt: skip
def test_scripts(text: str, expected: dict[str, Any]) -> None:
    found = list(mentions(text))
    assert dict(reversed(found)) == expected, "the first mention counts"


def test_importing_needs_no_torch() -> None:
    import subprocess

    code = "import sys, nemo_llm.migrate.configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
