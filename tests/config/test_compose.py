"""Every YAML file composes and decodes, lists every key with a comment, and adds no key that is not a field."""

import dataclasses
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_llm
from nemo_llm.config import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    ExpManagerConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelismConfig,
    PeftConfig,
    PrecisionConfig,
    RunConfig,
    SampleConfig,
    SchedConfig,
    TaskConfig,
    TrainerConfig,
)
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.config.commands.prepare import DataPrepConfig, PrepareConfig
from nemo_llm.config.compose.catalog import TOOL_GROUPS, conf_dir, group_choices, known_keys
from nemo_llm.config.compose.load import compose, decode, to_dict
from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.config.sections.performance import PerformanceConfig
from nemo_llm.config.sections.run_services import EvaluationConfig

ALL_FILES = sorted(conf_dir().rglob("*.yaml"))
TOOL_FILES = [path for path in ALL_FILES if path.parent.name in TOOL_GROUPS]
FILES = [path for path in ALL_FILES if path not in TOOL_FILES]
GROUPS = group_choices([conf_dir()])
SECTIONS: dict[str, type] = {
    "trainer": TrainerConfig,
    "parallelism": ParallelismConfig,
    "peft": PeftConfig,
    "precision": PrecisionConfig,
    "performance": PerformanceConfig,
    "optim": OptimConfig,
    "optim/sched": SchedConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "checkpoint": CheckpointConfig,
    "exp_manager": ExpManagerConfig,
    "cluster": ClusterConfig,
    "sample": SampleConfig,
    "evaluation": EvaluationConfig,
    "model/family": ModelConfig,
}
SECTIONS |= {
    f"task/{name}": section
    for section in get_args(get_args(TaskConfig)[0])
    for name in get_args(get_type_hints(section)["name"])
}
# What a file of a group leaves to another group.
ELSEWHERE = {"optim": {"sched"}, "data": {"tokenizer"}}
# data=blend is for the user's own files, so a source has to be named.
NEEDS = {
    "data/blend": ["data.blend=[1.0,/data/mine]"],
    "data/chat": ["data.blend=[{name: a, chat: a.jsonl}]"],
    "data/labelled": ["data.blend=[{name: a, labelled: a.jsonl}]"],
}
# Files that read a folder: tests/config/test_derived.py composes them.
FROM_FOLDER = {"from_hf", "from_checkpoint"}


def group_of(path: Path) -> str:
    return path.parent.relative_to(conf_dir()).as_posix()


def arguments_for(path: Path) -> list[str]:
    """Arguments that compose a run with `path` in it."""
    group = group_of(path)
    if group in (".", "model/family"):
        return ["+model=moe_tiny"]
    chosen = [f"{group}={path.stem}"] if group != "model" else []
    model = path.stem if group == "model" else "gpt_tiny"
    return [f"+model={model}", *chosen, *NEEDS.get(f"{group}/{path.stem}", [])]


def test_all_files_are_found() -> None:
    assert len(FILES) >= 45
    named = "gpt_tiny moe_tiny gpt_126m gpt_1b gpt_5b gpt_7b gpt_20b gpt_175b llama3_1b llama3_8b"
    assert set(GROUPS["model"]) >= set(named.split())


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.stem not in FROM_FOLDER],
    ids=lambda path: path.relative_to(conf_dir()).as_posix(),
)
def test_file_composes_and_decodes(path: Path) -> None:
    cfg = compose(arguments_for(path))
    assert decode(yaml.safe_load(yaml.safe_dump(to_dict(cfg)))) == cfg


@pytest.mark.parametrize("path", TOOL_FILES, ids=lambda path: path.relative_to(conf_dir()).as_posix())
def test_rules_of_the_data_tool_compose_and_decode(path: Path) -> None:
    config = compose_tool("prepare_data", PrepareConfig, [f"data_prep={path.stem}", "input=a", "output=b"])
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [(above, line) for above, line in pairwise(lines) if line.partition(":")[0].strip().isidentifier()]
    assert all(above.lstrip().startswith("#") for above, line in keys if line.strip() != "defaults:")
    if path.stem == "web":  # the others are written as differences to it
        assert set(yaml.safe_load("\n".join(lines))) == {field.name for field in dataclasses.fields(DataPrepConfig)}
        assert {f.name for f in dataclasses.fields(DataPrepConfig) if not getattr(config.data_prep, f.name)} == {
            "source"
        }


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if {group_of(path), f"{group_of(path)}/{path.stem}"} & set(SECTIONS)],
    ids=lambda path: path.relative_to(conf_dir()).as_posix(),
)
def test_file_lists_every_field_with_a_comment(path: Path) -> None:
    group = group_of(path)
    section = MoeConfig if path.stem == "moe" else SECTIONS.get(f"{group}/{path.stem}") or SECTIONS[group]
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content.pop("defaults", None)
    fields = {field.name for field in dataclasses.fields(section)} - ELSEWHERE.get(group, set())
    assert set(content) == fields
    lines = path.read_text(encoding="utf-8").splitlines()
    commented = {line.partition(":")[0] for above, line in pairwise(lines) if above.startswith("#")}
    bare = set(content) - commented
    assert not bare, f"{path.name}: no comment above {bare}"


def test_every_field_is_in_yaml_and_none_has_a_default() -> None:
    """Defaults live in conf/ alone: a field may default to None, in parts that are optional, and to nothing else."""
    for section in {RunConfig, *SECTIONS.values(), MoeConfig}:
        for field in dataclasses.fields(section):
            assert field.default in (dataclasses.MISSING, None), f"{section.__name__}.{field.name}"
            assert field.default_factory is dataclasses.MISSING, f"{section.__name__}.{field.name}"
    composed = to_dict(compose(["+model=moe_tiny"]))
    assert set(composed) == {field.name for field in dataclasses.fields(RunConfig)}
    assert set(composed["model"]["moe"]) == {field.name for field in dataclasses.fields(MoeConfig)}


def test_known_keys_are_the_keys_of_a_composed_run() -> None:
    def leaves(value: Any, prefix: str) -> set[str]:
        if isinstance(value, dict) and value and prefix.rstrip(".") in mappings | {""}:
            return {key for name, part in value.items() for key in leaves(part, f"{prefix}{name}.")}
        return {prefix.rstrip(".")}

    mappings = {key for key in known_keys() if any(other.startswith(f"{key}.") for other in known_keys())}
    assert leaves(to_dict(compose(["+model=gpt_tiny"])), "") <= set(known_keys())


@pytest.mark.parametrize("model", ["gpt_tiny", "gpt_1b"])
def test_command_line_wins_over_the_models_defaults(model: str) -> None:
    default = compose([f"+model={model}"])
    other = "bf16" if default.precision.name == "fp32" else "fp32"
    changed = compose([f"+model={model}", f"precision={other}", "optim.lr=0.125", "trainer.max_steps=7"])
    assert (changed.precision.name, changed.optim.lr, changed.trainer.max_steps) == (other, 0.125, 7)
    assert changed.model == default.model


def test_sizes_choose_their_precision() -> None:
    chosen = {
        model: compose([f"+model={model}"]).precision.name for model in GROUPS["model"] if model not in FROM_FOLDER
    }
    assert {model for model, name in chosen.items() if name == "fp32"} == {"gpt_tiny", "moe_tiny"}
    assert set(chosen.values()) == {"fp32", "bf16"}


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_experiment_is_laid_over_the_model_in_any_order(experiment: str) -> None:
    first = compose([f"+experiment={experiment}", "+model=gpt_tiny"])
    last = compose(["+model=gpt_tiny", f"+experiment={experiment}"])
    assert first == last
    assert first != compose(["+model=gpt_tiny"])
    content = yaml.safe_load((conf_dir() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    assert "model" not in content


def test_users_own_folder_adds_choices(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.5\n", encoding="utf-8")
    assert compose(["+model=gpt_tiny", "+experiment=mine"], tmp_path).optim.lr == 0.5


@settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-12, 10.0, allow_nan=False),
    overrides=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.none() | st.booleans() | st.integers()),
)
def test_decode_inverts_to_dict(steps: int, lr: float, overrides: dict[str, Any]) -> None:
    mapping = to_dict(TINY)
    mapping["trainer"]["max_steps"], mapping["optim"]["lr"] = steps, lr
    mapping["model"]["mcore_overrides"] = overrides
    cfg = decode(mapping)
    assert (cfg.trainer.max_steps, cfg.optim.lr, cfg.model.mcore_overrides) == (steps, lr, overrides)
    assert decode(to_dict(cfg)) == cfg


TINY = compose(["+model=gpt_tiny"])


def test_sections_are_frozen_and_without_dictionaries() -> None:
    def walk(section: type) -> None:
        assert section.__dataclass_params__.frozen, section
        assert not hasattr(section, "__dict__") or "__slots__" in section.__dict__, section
        for hint in get_type_hints(section).values():
            for part in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(part) and get_origin(part) is None:
                    walk(part)

    walk(RunConfig)


def test_hydra_leaves_no_trace(tmp_path: Path) -> None:
    script = "from nemo_llm.config.compose.load import compose; compose(['+model=gpt_tiny'])"
    environment = {"PYTHONPATH": str(Path(nemo_llm.__file__).resolve().parents[1]), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-B", "-c", script], cwd=tmp_path, check=True, env=environment)
    assert list(tmp_path.iterdir()) == []
