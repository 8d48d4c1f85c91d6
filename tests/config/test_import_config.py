"""Files in the form of NeMo's launcher and of Megatron-LM become model files of ours; every key is accounted for."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_llm.config.compose.catalog import known_keys
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import InputError
from nemo_llm.migrate.arguments import mentions
from nemo_llm.migrate.configs import CODECS, import_file, model_file
from nemo_llm.migrate.rows import Imported
from nemo_llm.migrate.tables import tables_of

LAUNCHER = """
run:
  name: small
  time_limit: "0-01:00:00"
trainer:
  num_nodes: 2
  devices: 8
  precision: bf16
  max_steps: 3000
  max_time: "01:02:30:00"
  val_check_interval: 500
  limit_val_batches: 20
  gradient_clip_val: 1.0
model:
  micro_batch_size: 2
  global_batch_size: 256
  tensor_model_parallel_size: 2
  sequence_parallel: true
  encoder_seq_length: 2048
  max_position_embeddings: 2048
  num_layers: 8
  hidden_size: 512
  ffn_hidden_size: ${multiply:4, ${.hidden_size}}
  num_attention_heads: 8
  num_query_groups: 4
  normalization: layernorm1p
  bias: false
  activation: fast-swiglu
  position_embedding_type: rope
  rotary_percentage: 0.5
  share_embeddings_and_output_weights: false
  masked_softmax_fusion: true
  some_new_key: 3
  optim:
    name: distributed_fused_adam
    lr: 2e-4
    betas: [0.9, 0.95]
    sched: {name: CosineAnnealing, warmup_steps: 115.5, min_lr: 2e-5}
  data:
    seq_length: 2048
    splits_string: "99990,8,2"
    data_prefix: [1.0, "${data_dir}/text"]
"""

ARGUMENTS = """
#!/bin/bash
LAYERS=${1:-12}
TP=2
ARGS=(
    --num-layers $LAYERS --hidden-size 768 --num-attention-heads 12
    --seq-length 1024 --max-position-embeddings 1024   # a comment with --lr 9
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --position-embedding-type rope
)
DTYPE_ARGS+=( "--fp8-format hybrid" "--fp8-amax-history-len 1024" )
torchrun pretrain_gpt.py ${ARGS[@]} \\
    --tensor-model-parallel-size $TP --train-samples 2560 --global-batch-size 256 --micro-batch-size 4 \\
    --lr 1.5e-4 --min-lr 1.0e-5 --lr-decay-style cosine --lr-decay-samples 2500 --lr-warmup-samples 300 --bf16 \\
    --data-path 0.5 /data/a 0.5 /data/b --decoupled-lr 5e-4 --use-mcore-models
"""


def imported(tmp_path: Path, name: str, text: str) -> tuple[Imported, RunConfig]:
    source = tmp_path / name
    source.write_text(text)
    result = import_file(source, "auto")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(model_file(result, "mine", name))
    return result, compose(["+model=mine"], tmp_path)


def test_a_launcher_file(tmp_path: Path) -> None:
    result, cfg = imported(tmp_path, "small.yaml", LAUNCHER)
    model = cfg.model
    assert (model.num_layers, model.ffn_hidden_size, model.num_query_groups) == (8, 2048, 4)
    assert (model.normalization, model.layernorm_zero_centered_gamma) == ("LayerNorm", True)
    assert (model.activation_func, model.gated_linear_unit, model.add_bias_linear) == ("silu", True, False)
    assert (cfg.optim.adam_beta2, cfg.optim.sched.name, cfg.optim.sched.warmup_steps) == (0.95, "cosine", 117)
    assert (cfg.optim.sched.decay_steps, cfg.trainer.max_time_minutes) == (3001, 1590.0)
    assert (cfg.parallelism.tensor_model_parallel_size, cfg.parallelism.use_distributed_optimizer) == (2, True)
    assert (cfg.precision.name, cfg.data.split) == ("bf16", "99990,8,2")
    became = {row.key: row for row in result.rows}
    assert became["model.masked_softmax_fusion"].became == "left"
    assert became["model.data.data_prefix"].became == "unmapped"
    assert "data_dir" in str(became["model.data.data_prefix"])
    # Every key of the file has a row, beside those that NeMo's defaults add.
    assert {"run.time_limit", "model.some_new_key", "model.encoder_seq_length"} <= set(became)


def test_a_megatron_script(tmp_path: Path) -> None:
    result, cfg = imported(tmp_path, "train.sh", ARGUMENTS)
    model = cfg.model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_query_groups) == (12, 768, 2048, 12)
    assert (model.activation_func, model.gated_linear_unit, model.add_bias_linear) == ("silu", True, False)
    assert (model.share_embeddings_and_output_weights, model.normalization) == (False, "RMSNorm")
    assert (model.hidden_dropout, model.attention_dropout) == (0.1, 0.1)  # Megatron-LM's defaults
    assert (cfg.trainer.max_steps, cfg.optim.sched.decay_steps, cfg.optim.sched.warmup_steps) == (10, 10, 2)
    assert cfg.precision.fp8 is not None
    assert cfg.precision.fp8.fp8 == "hybrid"
    assert cfg.data.blend == (0.5, "/data/a", 0.5, "/data/b")
    assert cfg.optim.lr == 1.5e-4
    became = {row.key: row.became for row in result.rows}
    assert (became["decoupled-lr"], became["use-mcore-models"]) == ("unmapped", "left")


def test_arguments_in_one_line() -> None:
    assert dict(mentions("python pretrain_gpt.py --lr=1e-4 --seed 7 --bf16 --rampup-batch-size 32 32 1000")) == {
        "lr": 1e-4,
        "seed": 7,
        "bf16": True,
        "rampup-batch-size": [32, 32, 1000],
    }


@pytest.mark.parametrize("table", [tables_of("nemo").keys, tables_of("megatron").keys], ids=["nemo", "megatron"])
def test_tables_name_keys_and_codecs_that_exist(table: dict) -> None:
    keys = set(known_keys()) | {"precision"}
    for foreign, (targets, codec) in table.items():
        assert set(targets.split(", ")) <= keys, foreign
        assert codec in CODECS or codec.startswith("flag:"), foreign


@pytest.mark.parametrize(("name", "text", "word"), [("a.yaml", "x: 1", "no `model` section"), ("b.yaml", "[", "YAML")])
def test_files_that_are_something_else(tmp_path: Path, name: str, text: str, word: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=word):
        import_file(tmp_path / name, "auto")


def test_the_command_writes_a_file_that_composes(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(LAUNCHER)
    tool = Path(__file__).parents[2] / "tools" / "import_config.py"
    command = [sys.executable, str(tool), f"input={tmp_path}/small.yaml", f"output={tmp_path}/conf"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 3, first.stderr
    assert "unmapped  model.some_new_key = 3" in first.stdout
    assert "use it with --config-dir" in first.stdout
    assert compose(["+model=small"], tmp_path / "conf").model.hidden_size == 512
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    more = subprocess.run([*command, "overwrite=true", "allow_unmapped=true"], capture_output=True, text=True)
    assert more.returncode == 0, more.stderr
    (tmp_path / "small.yaml").write_text(LAUNCHER.replace("global_batch_size: 256", "global_batch_size: 3"))
    wrong = subprocess.run([*command, "overwrite=true"], capture_output=True, text=True)
    assert "to mend before training on 16 processes: trainer.global_batch_size" in wrong.stdout
    (tmp_path / "small.yaml").write_text("model: {hidden_size: 512}")
    broken = subprocess.run([*command, "overwrite=true"], capture_output=True, text=True)
    assert broken.returncode == 2
    assert "use it with" not in broken.stdout
