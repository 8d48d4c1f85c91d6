"""Configurations that lack keys, as earlier versions saved them, are read with the shipped values of these keys."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_llm.config.compose.catalog import conf_dir
from nemo_llm.config.compose.load import compose, decode_saved, to_dict
from nemo_llm.errors import ConfigError

BLEND = "data.blend=[{{name: mine, {}: a.jsonl}}]"
RUNS = {
    "llama": ["+model=gpt_tiny", "peft=dora", "optim/sched=wsd", "data=chat", "task=sft", BLEND.format("chat")],
    "mixture": ["+model=moe_tiny", "optim=muon", "precision=fp8_delayed", "data=mock", "cluster=h100"],
    "latent attention": [
        "+model=deepseek_v2_lite",
        "peft=ia3",
        "data=labelled",
        "tokenizer=byte",
        BLEND.format("labelled"),
    ],
}


_OF_ONE_METHOD = (("model", "mla"), ("model", "rope_scaling"), ("optim", "muon"))


def leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all keys, sections too."""
    found = []
    for key, value in tree.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += leaves(value, (*prefix, key))
    return found


def without(tree: dict[str, Any], paths: list[tuple[str, ...]]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for *parents, leaf in paths:
        section: Any = tree
        for key in parents:
            section = section.get(key, {})
        section.pop(leaf, None)
    return tree


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def sizes() -> set[tuple[str, ...]]:
    """Keys that every model file gives; no version lacked them."""
    family = conf_dir() / "model" / "family"
    found = {
        ("model", key) for key, value in yaml.safe_load((family / "llama.yaml").read_text()).items() if value == "???"
    }
    moe = yaml.safe_load((family / "moe.yaml").read_text())
    return found | {("model", "moe", key) for key, value in moe.items() if value == "???"} | {("model", "name")}


@pytest.mark.parametrize("name", RUNS)
def test_any_key_may_be_younger_than_the_file(name: str) -> None:
    saved = to_dict(compose(RUNS[name]))
    # Not the names that choose the files, nor sections that hold sizes or belong to one method alone.
    old = sizes() | {(), ("model",), ("model", "moe"), ("peft",), ("peft", "kind"), ("run",), ("run", "name")}
    old |= {path for path in leaves(saved) if path[-1] == "name" or path[:2] in _OF_ONE_METHOD}
    old |= {
        ("data", "blend"),
        ("precision", "fp8"),
        ("optim",),
        ("precision",),
        ("data",),
        ("data", "tokenizer"),
        ("optim", "sched"),
    }
    keys = [path for path in leaves(saved) if path not in old]
    draw = random.Random(7)
    for _ in range(12):
        removed = draw.sample(keys, draw.choice((1, 3, 20)))
        read = to_dict(decode_saved(without(saved, removed)))
        kept = [path for path in leaves(saved) if not any(path[: len(gone)] == gone for gone in removed)]
        for path in kept:
            if not isinstance(at(saved, path), dict):
                assert at(read, path) == at(saved, path), path


def test_the_values_are_those_of_the_file_that_the_section_was_made_from() -> None:
    saved = to_dict(compose(["+model=moe_tiny", "optim=muon", "precision=fp8_delayed", "peft=dora", "optim/sched=wsd"]))
    some = [
        ("optim", "weight_decay"),
        ("optim", "sched", "wsd_decay_style"),
        ("precision", "fp8", "fp8_amax_history_len"),
        ("precision", "grad_reduce_in_fp32"),
        ("peft", "use_rslora"),
        ("model", "moe", "moe_layer_freq"),
        ("performance", "flex_attention"),
        ("evaluation",),
    ]
    assert to_dict(decode_saved(without(saved, some))) == saved


def test_a_section_that_was_null_stays_null_and_a_size_is_never_guessed() -> None:
    saved = to_dict(compose(["+model=gpt_tiny"]))
    read = decode_saved(saved)
    assert (read.peft, read.model.moe, read.precision.fp8) == (None, None, None)
    with pytest.raises(ConfigError, match=r"model\.hidden_size: missing"):
        decode_saved(without(saved, [("model", "hidden_size")]))


def test_a_saved_run_of_an_earlier_commit() -> None:
    golden = Path(__file__).parents[1] / "golden" / "runs" / "lora_96e171a" / "lora" / "checkpoints" / "step_00000002"
    saved = yaml.safe_load((golden / "config.yaml").read_text())
    assert "flex_attention" not in saved["performance"]
    shipped = to_dict(compose(["+model=gpt_tiny"]))["performance"]
    assert decode_saved(saved).performance.flex_attention == shipped["flex_attention"]
