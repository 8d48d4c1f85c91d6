"""Small files of other programs with values of odd kinds: refused by name, and soon, by whatever reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.convert.hf_files import INDEX_NAME, HfReader
from nemo_llm.convert.megatron_files import _fields_of_yaml
from nemo_llm.errors import ConfigError, InputError
from nemo_llm.evaluation.harness import _specification
from nemo_llm.migrate.configs import import_file, import_nemo_model
from nemo_llm.peft.hf_format import section_of_folder
from nemo_llm.tokenizers.tokenizer import load_tokenizer
from tests.convert.test_special_tokens import build, write_config, write_tokenizer

DEEP = "[" * 100_000
GOOD = json.loads(build("template").to_str())


def _tokenizer(**changes: Any) -> tuple[str, Any]:
    return "tokenizer.json", {**GOOD, **changes}


def _config(**settings: Any) -> tuple[str, Any]:
    return "config.json", {"model_type": "llama", **settings}


# File, its content, and what the message names.
FOLDERS: dict[str, tuple[tuple[str, Any], str]] = {
    "end token as text": (("generation_config.json", {"eos_token_id": "</s>"}), "eos_token_id"),
    "end token as a fraction": (("generation_config.json", {"eos_token_id": 2.0}), "eos_token_id"),
    "end token true": (("generation_config.json", {"eos_token_id": True}), "eos_token_id"),
    "end tokens in a list of lists": (("generation_config.json", {"eos_token_id": [[2]]}), "eos_token_id"),
    "end tokens with null": (("generation_config.json", {"eos_token_id": [2, None]}), "eos_token_id"),
    "several beginnings": (("generation_config.json", {"bos_token_id": [1]}), "bos_token_id"),
    "generation_config nests deeply": (("generation_config.json", DEEP), "generation_config.json"),
    "config nests deeply": (("config.json", DEEP), "config.json"),
    "tokenizer_config nests deeply": (("tokenizer_config.json", DEEP), "tokenizer_config.json"),
    "model_type is a list": (("config.json", {"model_type": ["llama"]}), "model_type"),
    "rope_scaling is a word": (("rope_scaling", "linear"), "rope_scaling"),
    "rope_scaling is a list": (("rope_scaling", [1]), "rope_scaling"),
    "a token without content": (("tokenizer_config.json", {"eos_token": {"lstrip": False}}), "tokenizer_config.json"),
    "a token that is a list": (("tokenizer_config.json", {"eos_token": ["</s>"]}), "tokenizer_config.json"),
    "a token that is a number": (("tokenizer_config.json", {"eos_token": 5}), "tokenizer_config.json"),
    "no tokens": (
        _tokenizer(model={**GOOD["model"], "vocab": {}, "merges": []}, added_tokens=[], post_processor=None),
        "tokenizer.json",
    ),
    "a tokenizer that panics": (
        _tokenizer(post_processor={**GOOD["post_processor"], "special_tokens": {}}),
        "tokenizer.json",
    ),
    "a tokenizer that cannot encode": (
        _tokenizer(model={"type": "Unigram", "unk_id": None, "vocab": []}, added_tokens=[], post_processor=None),
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_odd_values_of_a_model_folder_are_named(name: str, tmp_path: Path) -> None:
    (file, content), named = FOLDERS[name]
    write_tokenizer(tmp_path, "template")
    write_config(tmp_path, **({file: content} if file == "rope_scaling" else {}))
    if file != "rope_scaling":
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ConfigError, InputError), match=named):
        load_tokenizer(compose(["+model=from_hf", f"model.hf_path={tmp_path}"]).data.tokenizer).save(tmp_path / "saved")


@pytest.mark.parametrize("shard", ["../other.safetensors", "OUTSIDE", 1, None, "a/../../other.safetensors"])
def test_shards_outside_of_the_folder_are_not_read(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    given = str(tmp_path / "other.safetensors") if shard == "OUTSIDE" else shard
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": given}}))
    with pytest.raises(InputError, match=INDEX_NAME):
        HfReader(folder)
    (folder / INDEX_NAME).write_text(DEEP)
    with pytest.raises(InputError, match=INDEX_NAME):
        HfReader(folder)


@pytest.mark.parametrize("content", [DEEP, '{"peft_type": ["LORA"]}', "[]"])
def test_odd_configurations_of_an_adapter_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=str(tmp_path)):
        section_of_folder(tmp_path)


READERS: dict[str, Callable[[Path], Any]] = {
    "import_config": lambda path: import_file(path, "nemo"),
    ".nemo": import_nemo_model,
    "NeMo 2": lambda path: _fields_of_yaml(path, "config"),
    "lm-eval": lambda path: _specification(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_yaml_whose_aliases_grow_without_end_is_refused_at_once(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    for text in ("\n".join(["a0: &a0 [x]", *rows]), "model: &a [*a]", "model: &a {<<: *a}"):
        path.write_text(text)
        with pytest.raises(InputError, match="aliases"):
            READERS[reader](path)


def test_yaml_with_a_few_aliases_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("size: &size 64\nmodel: {hidden_size: *size, ffn_hidden_size: *size}\n")
    assert import_file(path, "nemo").keys["model.ffn_hidden_size"] == 64


@pytest.mark.parametrize("value", ["${.hidden_size}", "${model.ffn_hidden_size}", "${multiply:2, ${.hidden_size}}"])
def test_references_that_come_back_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"model: {{hidden_size: '{value}', ffn_hidden_size: '{value}'}}\n")
    with pytest.raises(InputError, match="refers to itself"):
        import_file(path, "nemo")


def test_division_by_zero_stays_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {hidden_size: 8, ffn_hidden_size: '${divide_ceil:8, 0}'}\n")
    assert [row.became for row in import_file(path, "nemo").rows if row.value == "${divide_ceil:8, 0}"] == ["unmapped"]
