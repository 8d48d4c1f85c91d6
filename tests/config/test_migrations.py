"""Saved configurations of earlier versions: each change since then is a migration, and today's keys come out."""

import copy
import datetime
import importlib
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_llm import __version__
from nemo_llm.checkpoint.folder import read_config
from nemo_llm.checkpoint.saved_run import SavedRun, config_text
from nemo_llm.config import migrations
from nemo_llm.config.compose.catalog import conf_dir, group_choices, known_keys
from nemo_llm.config.compose.decode import decode, key_problems, to_dict
from nemo_llm.config.compose.load import compose
from nemo_llm.config.migrations import Migration, migrate, saved_by
from nemo_llm.errors import ConfigError, InputError

RUNS = Path(__file__).parents[1] / "golden" / "runs"
SAVED = sorted(RUNS.glob("*/*/checkpoints/step_*/config.yaml"))
WHOLE = RUNS.parent / "every_section_0d8d993.yaml"
"""Every section that could be null is there; composed, and not trained, by that commit."""
FILES = [*SAVED, WHOLE]
NAMES = [path.relative_to(RUNS.parent).parts[:2][-1] for path in FILES]
METHODS = group_choices([conf_dir()])["peft"]
HEADS = RUNS / "classes_2a128c1" / "run" / "checkpoints" / "step_00000002"


def with_method(kind: str) -> dict[str, Any]:
    """`WHOLE` with another method of ``peft``; at that time each held the keys of all."""
    saved = yaml.safe_load(WHOLE.read_text(encoding="utf-8"))
    return {**saved, "peft": {**saved["peft"], "kind": kind}}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all values, sections too."""
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
    return sorted(found)


def complaint(saved: dict[str, Any], known: list[Migration] | None = None) -> str:
    """What is wrong with the migrations, in words that say what to write; empty where nothing is."""
    migrated = migrate(saved, "a saved run", known)
    keys = [problem.key for problem in key_problems(migrated)]
    if not keys:  # what a default of a dataclass fills needs a migration too
        keys = sorted(set(leaves(to_dict(decode(migrated)))) ^ set(leaves(migrated)))
    return (
        ""
        if not keys
        else (
            f"saved runs and RunConfig differ in {', '.join(keys)}, and no migration says why.\n"
            "Add nemo_llm/config/migrations/mYYYY_MM_DD_slug.py with ADDED = {KEY: the value that leaves earlier runs "
            "as they were}, RENAMED = {OLD: NEW}, DROPPED = (KEY,) or def change(saved)"
        )
    )


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_key_since_then_came_with_a_migration(path: Path) -> None:
    assert not complaint(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("kind", METHODS)
def test_every_key_of_a_method_came_with_a_migration(kind: str) -> None:
    assert not complaint(with_method(kind))
    assert not key_problems(to_dict(compose(["+model=gpt_tiny", f"peft={kind}"])))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_sources_come_out_as_they_are_saved_today(path: Path) -> None:
    migrated = migrate(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    today = json.loads(json.dumps(to_dict(decode(migrated))))
    assert migrated["data"]["blend"] == today["data"]["blend"]
    assert all("kind" in entry for entry in migrated["data"]["blend"])


def test_recorded_runs_hold_every_section() -> None:
    saved = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES] + list(map(with_method, METHODS))
    held = {key for one in saved for key in leaves(migrate(one, "a saved run"))}
    in_lists = ("data.blend.", "data.blend_changes.")
    assert not [key for key in known_keys() if key not in held and not key.startswith(in_lists)]


YOUNGER = [key for one in migrations.migrations() if one.name > "2026_11_26" for key in one.added]
"""Keys that came after the oldest recorded run."""


@pytest.mark.parametrize("key", YOUNGER)
def test_a_key_without_a_migration_is_noticed(key: str) -> None:
    known = [replace(m, added={k: v for k, v in m.added.items() if k != key}) for m in migrations.migrations()]
    said = [complaint(yaml.safe_load(path.read_text(encoding="utf-8")), known) for path in FILES]
    assert any(f"differ in {key}" in text and "Add nemo_llm/config/migrations/" in text for text in said)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_migrations_are_pure_and_leave_the_new_form_alone(path: Path) -> None:
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    before = copy.deepcopy(saved)
    once = migrate(saved, path)
    assert saved == before
    assert migrate(once, path) == once


def test_a_migration_takes_parts_of_a_configuration() -> None:
    for migration in migrations.migrations():
        sections = {key for key in migration.added if "." not in key}
        assert set(migration({})) == sections
        assert migration({"peft": None})["peft"] is None


def test_younger_keys_have_the_value_that_leaves_the_run_as_it_was() -> None:
    cfg = SavedRun.at(RUNS / "sft_0d8d993" / "run").sections
    assert (cfg.model.head, cfg.model.rotary_local_base, cfg.model.mla, cfg.optim.muon) == (None, None, None, None)
    performance = cfg.performance
    assert not any((performance.flex_attention, performance.choose_matrix_kernels, cfg.trainer.check_memory))
    assert (performance.offload_activation_layers, performance.offload_optimizer_moments) == (0, False)
    # Whatever is shipped today.
    shipped = compose(["+model=gpt_tiny"])
    assert shipped.performance.flex_attention
    assert shipped.trainer.check_memory


@pytest.mark.parametrize(
    "arguments",
    [
        ["+model=gpt_tiny", "peft=dora", "optim/sched=wsd"],
        ["+model=moe_tiny", "optim=muon", "precision=fp8_delayed", "data=mock"],
        ["+model=deepseek_v2_lite", "peft=ia3", "tokenizer=byte"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_any_of_the_added_keys_may_be_missing_and_no_other_changes(arguments: list[str]) -> None:
    saved = json.loads(json.dumps(to_dict(compose(arguments))))
    added = {key: value for migration in migrations.migrations() for key, value in migration.added.items()}
    draw = random.Random(7)
    for _ in range(12):
        removed = draw.sample(sorted(added), draw.choice((1, 3, 6)))
        lacking = copy.deepcopy(saved)
        for key in removed:
            migrations.move_key(lacking, key, None)
        read = json.loads(json.dumps(to_dict(decode(migrate(lacking, "a saved run")))))
        for key in leaves(saved):
            value = at(saved, key)
            if not isinstance(value, dict) and not any(f"{key}.".startswith(f"{gone}.") for gone in removed):
                assert at(read, key) == value, key
        for key in removed:
            if not isinstance(added[key], dict) and at(saved, key.rpartition(".")[0]) is not None:
                assert at(read, key) == added[key], key


def at(tree: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        tree = None if tree is None else tree[key]
    return tree


def test_a_section_that_was_null_stays_null_and_a_size_is_never_guessed() -> None:
    saved = to_dict(compose(["+model=gpt_tiny"]))
    read = decode(migrate(saved, "a saved run"))
    assert (read.peft, read.model.moe, read.precision.fp8) == (None, None, None)
    del saved["model"]["hidden_size"]
    with pytest.raises(ConfigError, match=r"model\.hidden_size: missing"):
        decode(migrate(saved, "a saved run"))


def saved_in(folder: Path, **sections: Any) -> Path:
    """A folder with the configuration of a recorded run, and these sections in it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**read_config(HEADS), **sections}), encoding="utf-8")
    return folder


def test_a_run_of_a_newer_version_is_refused_with_the_version_that_reads_it(tmp_path: Path) -> None:
    newer = {"version": "0.9.0", "migrations": [*saved_by()["migrations"], "2031_05_01_more", "2031_06_01_less"]}
    with pytest.raises(InputError) as caught:
        SavedRun.at(saved_in(tmp_path, saved_by=newer))
    for word in ("config.yaml", "0.9.0", __version__, "2031_05_01_more, 2031_06_01_less", "use nemo_llm 0.9.0"):
        assert word in str(caught.value)


@pytest.mark.parametrize("stamp", [None, "0.1.0", {"migrations": "all"}, {"migrations": {"a": 1}}, {"version": 1}])
def test_a_damaged_stamp_is_named_or_harmless(stamp: Any, tmp_path: Path) -> None:
    folder = saved_in(tmp_path, saved_by=stamp)
    if isinstance(stamp, dict) and "migrations" not in stamp:
        assert SavedRun.at(folder).sections
    else:
        with pytest.raises(InputError, match="damaged; saved_by"):
            SavedRun.at(folder)


def test_what_was_applied_is_not_applied_again(tmp_path: Path) -> None:
    lacking = read_config(HEADS)["trainer"]
    assert "check_memory" not in lacking
    with pytest.raises(ConfigError, match=r"trainer\.check_memory: missing in .*config\.yaml, and no migration"):
        SavedRun.at(saved_in(tmp_path, saved_by=saved_by()))


def test_a_key_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    config = read_config(HEADS)
    config["trainer"] |= {"warp_speed": 9}
    config["model"] |= {"ancient": {"a": 1}}
    with pytest.raises(ConfigError) as caught:
        SavedRun.at(saved_in(tmp_path, **config, museum={"saved_by": 1}))
    assert sorted(problem.key for problem in caught.value.problems) == ["model.ancient", "museum", "trainer.warp_speed"]
    assert all(f"nemo_llm {__version__} has no such key" in problem.rule for problem in caught.value.problems)


def test_a_date_that_was_written_by_hand_is_a_text(tmp_path: Path) -> None:
    folder = saved_in(tmp_path)
    data = read_config(HEADS)["data"]
    data["chat"] |= {"date": datetime.date(2026, 11, 26)}
    assert SavedRun.at(saved_in(folder, data=data)).sections.data.chat.date == "2026-11-26"


@pytest.mark.parametrize("name", ["mtp_num_layers", "softmax_type", "qk_clip", "qk_clip_alpha"])
def test_overrides_that_never_had_an_effect_are_left_out(name: str, tmp_path: Path) -> None:
    model = read_config(HEADS)["model"]
    model["mcore_overrides"] = {name: 1, "hidden_dropout": 0.0}
    assert SavedRun.at(saved_in(tmp_path, model=model)).sections.model.mcore_overrides == {"hidden_dropout": 0.0}


@pytest.fixture
def add_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Adds a module to the migrations, as a branch would."""
    folder = tmp_path / "added"
    folder.mkdir()
    monkeypatch.setattr(migrations, "__path__", [*migrations.__path__, str(folder)])

    def add(name: str, content: str) -> None:
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
        importlib.invalidate_caches()
        migrations.migrations.cache_clear()

    yield add
    migrations.migrations.cache_clear()
    for path in folder.glob("m*.py"):
        sys.modules.pop(f"{migrations.__name__}.{path.stem}", None)


def test_a_key_under_its_old_name_works_with_a_warning(
    add_module: Callable[[str, str], None], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    add_module("m2031_01_01_first", 'RENAMED = {"trainer.steps": "trainer.num_steps"}')
    add_module("m2031_01_02_again", 'RENAMED = {"trainer.num_steps": "trainer.max_steps"}')
    with caplog.at_level(logging.WARNING, "nemo_llm"):
        for name in ("trainer.steps", "+trainer.steps", "++trainer.num_steps", "trainer.num_steps"):
            caplog.clear()
            assert compose(["+model=gpt_tiny", f"{name}=7"]).trainer.max_steps == 7
            assert f"{name.lstrip('+')} is called trainer.max_steps now" in caplog.text
        caplog.clear()
        (tmp_path / "mine" / "experiment").mkdir(parents=True)
        own = "# @package _global_\ntrainer:\n  steps: 8\n"
        (tmp_path / "mine" / "experiment" / "own.yaml").write_text(own, encoding="utf-8")
        arguments = ["+model=gpt_tiny", "+experiment=own"]
        assert compose(arguments, tmp_path / "mine").trainer.max_steps == 8
        assert "trainer.steps is called trainer.max_steps now" in caplog.text
        assert compose([*arguments, "trainer.max_steps=9"], tmp_path / "mine").trainer.max_steps == 9
    trainer = read_config(HEADS)["trainer"]
    for old in ("steps", "num_steps"):
        saved = {key: value for key, value in trainer.items() if key != "max_steps"} | {old: 5}
        assert SavedRun.at(saved_in(tmp_path, trainer=saved)).sections.trainer.max_steps == 5


def test_a_group_and_a_section_under_their_old_name(add_module: Callable[[str, str], None], tmp_path: Path) -> None:
    add_module("m2031_01_01_section", 'RENAMED = {"speed": "performance"}')
    cfg = compose(["+model=gpt_tiny", "speed=default", "speed.compile_layers=true"])
    assert cfg.performance.compile_layers
    config = read_config(HEADS)
    folder = saved_in(tmp_path)
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "speed": config.pop("performance")}))
    assert SavedRun.at(folder).sections.performance.fused_rope is not None


def test_a_change_reshapes_what_was_saved_before_it_alone(
    add_module: Callable[[str, str], None], tmp_path: Path
) -> None:
    add_module(
        "m2031_01_01_minutes",
        "def change(saved):\n"
        '    if "trainer" in saved:\n'
        '        saved["trainer"]["step_timeout_minutes"] *= 60\n'
        "    return saved\n",
    )
    config = read_config(HEADS)
    before = config["trainer"]["step_timeout_minutes"]
    run = SavedRun.at(saved_in(tmp_path))
    assert run.sections.trainer.step_timeout_minutes == 60 * before
    again = SavedRun.at(saved_in(tmp_path, **run.mapping, saved_by=saved_by()))
    assert again.sections == run.sections


def test_a_saved_configuration_is_an_experiment_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    cfg = compose(["+model=gpt_tiny", "optim.lr=0.5"])
    path.write_text("# @package _global_\n" + config_text(json.loads(json.dumps(to_dict(cfg)))), encoding="utf-8")
    assert compose(["+model=gpt_tiny", "experiment=mine"], tmp_path) == cfg
    path.write_text(path.read_text(encoding="utf-8") + "  - 2031_01_01_later\n", encoding="utf-8")
    with pytest.raises(InputError, match="newer than this one"):
        compose(["+model=gpt_tiny", "experiment=mine"], tmp_path)
