"""``+model=from_hf`` and ``+model=from_checkpoint``: keys that a folder gives, and what is said when it cannot."""

import json
from pathlib import Path

import pytest
import yaml

from nemo_llm.config.compose.load import compose, decode, to_dict
from nemo_llm.errors import ConfigError

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}


def hf_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def from_hf(folder: Path, *more: str) -> list[str]:
    return ["+model=from_hf", f'model.hf_path="{folder}"', "tokenizer=byte", *more]


def test_config_json_decides_the_shape(tmp_path: Path) -> None:
    model = compose(from_hf(hf_folder(tmp_path / "small llama's"), "model.init_method_std=0.5")).model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (2, 64, 96)
    assert (model.num_query_groups, model.vocab_size, model.rotary_base) == (2, 131, 500000.0)
    assert model.rope_scaling is not None
    assert model.rope_scaling.factor == 8.0
    assert model.share_embeddings_and_output_weights
    assert model.family == "llama"
    assert model.init_method_std == 0.5  # the command line has the last word


def test_eod_token_comes_from_the_tokenizer_config(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = compose(["+model=from_hf", f"model.hf_path={folder}"]).data.tokenizer
    assert (tokenizer.path, tokenizer.eod_token) == (str(folder), "<|im_end|>")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, ["'lama'", "nearest: llama"]),
        ({"hidden_act": "mish"}, ["hidden_act", "'mish'"]),
        ({"num_hidden_layers": "absent"}, ["num_hidden_layers is missing"]),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ["'spiral'", "llama3, yarn, dynamic, linear"]),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, changes: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(from_hf(hf_folder(tmp_path, **changes)))
    (problem,) = caught.value.problems
    assert problem.key == "model.hf_path"
    assert all(word in str(problem) for word in words), str(problem)


@pytest.mark.parametrize(
    ("arguments", "key", "word"),
    [
        (["+model=from_hf"], "model.hf_path", "add model.hf_path=DIR"),
        (["+model=from_hf", "model.hf_path=/no/such"], "model.hf_path", "no such folder"),
        (["+model=from_checkpoint", "model.checkpoint_path=/no/such"], "model.checkpoint_path", "no complete"),
        (["+model=gpt_tiny", "model.hf_path=/some"], "model.hf_path", "+model=from_hf"),
    ],
)
def test_a_folder_that_is_missing_is_one_problem(arguments: list[str], key: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(arguments)
    assert caught.value.problems[0].key == key
    assert word in str(caught.value)


def test_a_checkpoint_gives_shape_tokenizer_and_weights(tmp_path: Path) -> None:
    trained = to_dict(compose(["+model=moe_tiny", "model.num_layers=3"]))
    step = tmp_path / "run" / "checkpoints" / "step_00000020"
    (step / "tokenizer").mkdir(parents=True)
    (step / "config.yaml").write_text(yaml.safe_dump(trained))
    saved = {**trained["data"]["tokenizer"], "path": "tokenizer.json", "name": "mine"}
    (step / "tokenizer" / "nemo_llm_tokenizer.json").write_text(json.dumps(saved))
    (step / "COMPLETE").write_text("")
    (step.parent / "step_00000030").mkdir()  # never finished
    for other in ("step_9", "step_00000021.kept"):  # an older one, though last by letters, and one of another name
        (step.parent / other).mkdir()
        (step.parent / other / "COMPLETE").write_text("")
    cfg = compose(["+model=from_checkpoint", f"model.checkpoint_path={tmp_path / 'run'}", "model.num_layers=4"])
    assert cfg.model.num_layers == 4
    assert to_dict(cfg)["model"]["moe"] == trained["model"]["moe"]
    assert cfg.data.tokenizer.name == "mine"
    assert cfg.data.tokenizer.path == str(step / "tokenizer" / "tokenizer.json")
    assert cfg.checkpoint.init_from == str(tmp_path / "run")
    assert decode(to_dict(cfg)) == cfg
