"""Making, locking, describing and reopening run folders."""

import dataclasses
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from nemo_llm.checkpoint.folder import read_config
from nemo_llm.checkpoint.saved_run import SavedRun
from nemo_llm.config.compose.load import compose
from nemo_llm.config.migrations import saved_by
from nemo_llm.errors import ConfigError, ExitCode, InputError
from nemo_llm.run.folder import git_commit, open_run_dir, to_plain, write_exit
from nemo_llm.storage.locks import RunLock


@functools.cache
def composed(*overrides):
    return compose(["+model=gpt_tiny", *overrides])


def config(run_dir=None, *overrides):
    cfg = composed(*overrides)
    return cfg if run_dir is None else dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str(run_dir)))


def with_checkpoint(run_dir):
    (run_dir / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000010" / "COMPLETE").touch()


def test_each_start_without_a_name_gets_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_run_dir(config(None, "run.name='my/run'")) as first, open_run_dir(config()) as second:
        assert re.fullmatch(r"my_run-\d{8}-\d{6}-[0-9a-f]{4}", first.path.name)
        assert re.fullmatch(r"gpt_tiny-\d{8}-\d{6}-[0-9a-f]{4}", second.path.name)
        assert first.path.parent == second.path.parent == tmp_path / "runs"


def test_config_yaml_decodes_to_the_same_configuration_and_says_what_ran(tmp_path):
    cfg = config(tmp_path / "run", "optim.lr=1e-8")
    with open_run_dir(cfg) as run_dir:
        assert SavedRun.at(run_dir.path).sections == cfg
        header = (run_dir.path / "config.yaml").read_text().split("\n\n")[0]
    assert "# command: " in header
    assert f"python {sys.version.split()[0]}" in header
    assert re.search(r"# commit: ([0-9a-f]{40}|not a git checkout)", header)
    assert "# image:" not in header


def test_config_yaml_names_the_container_image(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_LLM_IMAGE", "/images/nemo_llm.sqsh sha256:0123")
    with open_run_dir(config(tmp_path / "run")) as run_dir:
        assert "\n# image: /images/nemo_llm.sqsh sha256:0123\n" in (run_dir.path / "config.yaml").read_text()


def test_commit_of_a_checkout_and_of_a_plain_folder(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", git_commit(tmp_path))
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path).endswith("+changes")


def test_resume_with_allowed_changes_lists_them_and_keeps_the_old_file(tmp_path):
    with open_run_dir(config(tmp_path)) as run_dir:
        with_checkpoint(run_dir.path)
        assert run_dir.changes == []
    with open_run_dir(config(tmp_path)):
        pass
    assert not list(tmp_path.glob("config.before-*"))
    with open_run_dir(config(tmp_path, "trainer.max_steps=7", "optim.lr=0.5")) as run_dir:
        assert [change.key for change in run_dir.changes] == ["optim.lr", "trainer.max_steps"]
    assert read_config(tmp_path)["trainer"]["max_steps"] == 7
    before = yaml.safe_load((tmp_path / "config.before-1.yaml").read_text())
    assert before.pop("saved_by") == saved_by()
    assert before == to_plain(config(tmp_path))


def test_resume_with_another_model_is_refused_and_writes_nothing(tmp_path):
    with open_run_dir(config(tmp_path)):
        with_checkpoint(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        open_run_dir(config(tmp_path, "model.hidden_size=4096"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_of_an_earlier_version_resumes_and_its_missing_keys_are_listed(tmp_path):
    with open_run_dir(config(tmp_path)):
        with_checkpoint(tmp_path)
    saved = read_config(tmp_path)
    del saved["saved_by"], saved["data"]["labelled"], saved["performance"]["flex_attention"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"data\.labelled\.too_long = 'drop': .* was made with 'truncate'"):
        open_run_dir(config(tmp_path, "data.labelled.too_long=drop"))
    with open_run_dir(config(tmp_path)) as run_dir:
        assert [str(change) for change in run_dir.changes] == ["performance.flex_attention: False -> True"]


def test_an_override_that_never_had_an_effect_may_go(tmp_path, caplog):
    with open_run_dir(config(tmp_path)):
        with_checkpoint(tmp_path)
    saved = read_config(tmp_path)
    del saved["saved_by"]
    saved["model"]["mcore_overrides"] = {"softmax_type": "learnable", "qk_clip": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with caplog.at_level(logging.INFO, "nemo_llm"), open_run_dir(config(tmp_path)) as run_dir:
        assert run_dir.changes == []
    for name in ("softmax_type", "qk_clip"):
        assert f"model.mcore_overrides.{name} is left out" in caplog.text
    saved["model"]["mcore_overrides"] = {"glu_linear_offset": 1.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"model\.mcore_overrides\.glu_linear_offset: .* was made with 1\.0"):
        open_run_dir(config(tmp_path))


@pytest.mark.parametrize("where", ["trainer", "museum"])
def test_a_run_with_a_key_that_is_gone_is_not_resumed(where, tmp_path):
    with open_run_dir(config(tmp_path)):
        with_checkpoint(tmp_path)
    saved = read_config(tmp_path)
    saved.setdefault(where, {})["gone"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=rf"{where}\S* = .*config\.yaml holds it, and nemo_llm \S+ has no such key"):
        open_run_dir(config(tmp_path))


def test_start_that_left_no_checkpoint_may_be_mended(tmp_path):
    with open_run_dir(config(tmp_path)):
        (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)  # torn: no marker
    with open_run_dir(config(tmp_path, "model.hidden_size=4096")) as run_dir:
        assert read_config(run_dir.path)["model"]["hidden_size"] == 4096


def test_never_refuses_a_folder_with_checkpoints(tmp_path):
    with_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint.resume=never would mix two runs"):
        open_run_dir(config(tmp_path, "checkpoint.resume=never"))


@pytest.mark.parametrize("content", ["- a list\n", "a: [1\n", None])
def test_checkpoints_without_a_readable_config_are_refused(tmp_path, content):
    with_checkpoint(tmp_path)
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml"):
        open_run_dir(config(tmp_path))


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="a file of that name exists"):
        open_run_dir(config(tmp_path / "run"))
    with pytest.raises(InputError, match="cannot be made"):
        open_run_dir(config(tmp_path / "run" / "below"))


def test_exit_file_says_how_it_ended_and_goes_with_the_next_start(tmp_path):
    with open_run_dir(config(tmp_path)):
        write_exit(tmp_path, ExitCode.PREEMPTED, "SIGUSR1", 120)
    content = json.loads((tmp_path / "exit.json").read_text())
    assert (content["code"], content["meaning"], content["reason"], content["step"]) == (
        75,
        "preempted",
        "SIGUSR1",
        120,
    )
    assert content["pid"] == os.getpid()
    with open_run_dir(config(tmp_path)):
        assert not (tmp_path / "exit.json").exists()


HOLDER = """
import sys, time
from pathlib import Path
from nemo_llm.storage.locks import RunLock
lock = RunLock(Path(sys.argv[1]), 0.0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_run_is_refused_with_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(InputError, match=rf"in use by process {holder.pid} on .*, Slurm job 4711, since 20"):
        open_run_dir(config(tmp_path), lock_wait_seconds=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    with RunLock(tmp_path, wait_seconds=5.0):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_waits_for_a_process_that_is_ending(tmp_path, holder):
    subprocess.Popen(["sh", "-c", f"sleep 0.4; kill -9 {holder.pid}"])
    start = time.monotonic()
    with RunLock(tmp_path, wait_seconds=20.0):
        assert time.monotonic() - start > 0.2


def test_forked_child_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path, 0.0)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        # As a kill does: the parent's descriptor goes without an explicit unlock.
        lock._close()
        RunLock(tmp_path, 5.0).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_released_lock_is_free_and_names_nobody(tmp_path):
    lock = RunLock(tmp_path, 0.0)
    lock.release()
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""
    RunLock(tmp_path, 0.0).release()
