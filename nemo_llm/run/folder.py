"""The run folder: made or reopened, locked, described by ``config.yaml``, closed by ``exit.json``.

::

    <run.dir>/
      config.yaml          resolved configuration, with versions, commit and command line above it
      config.before-N.yaml what config.yaml was before the N-th resume that changed it
      metrics.jsonl        one object a logged step
      checkpoints/         step_00000010/ and so on
      exit.json            how the last process ended
      .lock                held while a process works here

Everything here is for the first rank alone.
"""

import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from nemo_llm.checkpoint.folder import CONFIG_FILE_NAME, find_checkpoint, read_progress
from nemo_llm.checkpoint.saved_run import SavedRun, config_text
from nemo_llm.config import RunConfig
from nemo_llm.config.compose.decode import to_dict
from nemo_llm.data.sampling.blend_history import check_blend_history
from nemo_llm.errors import CheckpointDamagedError, ConfigError, ExitCode, InputError
from nemo_llm.run.resume_rules import Change, check_agreement
from nemo_llm.storage.atomic_files import write_atomic
from nemo_llm.storage.locks import RunLock, holder_info

EXIT_FILE_NAME = "exit.json"

_DEFAULT_PARENT = "runs"
# A process that was just killed on this machine, or one that is writing its last lines, is gone by then.
_LOCK_WAIT_SECONDS = 5.0
_GIT_TIMEOUT_SECONDS = 5
_BLEND_KEYS = ("blend", "blend_changes")
_PACKAGES = ("nemo_llm", "torch", "megatron-core", "nemo_toolkit", "transformer-engine", "numpy")


class RunDir:
    """A run folder held by this process; a context manager that gives it back.

    Attributes:
        path: absolute path of the folder.
        changes: keys that this start changes in a run that it resumes, all allowed; list them for the user.
    """

    def __init__(self, path: Path, changes: list[Change], lock: RunLock):
        self.path = path
        self.changes = changes
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.release()


def open_run_dir(cfg: RunConfig, lock_wait_seconds: float = _LOCK_WAIT_SECONDS) -> RunDir:
    """Make or reopen the folder of a run, lock it, and write ``config.yaml``.

    ``run.dir: null`` makes a new folder ``runs/<name>-<timestamp>-<4 hex digits>``. In a folder with a complete
    checkpoint ``checkpoint.resume: never`` is refused, and otherwise the configuration must agree with the one saved
    there, but for `CHANGEABLE_KEYS`. Nothing is written before all that has passed.

    Raises:
        ConfigError: a key differs that a resume may not change.
        InputError: the folder is in use, cannot be written, or holds a run that would be mixed with this one.
    """
    changes: list[Change] = []
    config = to_plain(cfg)
    if cfg.run.dir is None:
        path = _make_new_folder(cfg.run.name)
    else:
        path = Path(cfg.run.dir).expanduser().absolute()
        changes = _check_present_run(path, cfg, config)
        _make_folder(path)
    lock = RunLock(path, lock_wait_seconds)
    try:
        write_config(path, config)
        # The end of an earlier process is not that of this one, which may be killed without a word.
        (path / EXIT_FILE_NAME).unlink(missing_ok=True)
    except BaseException:
        lock.release()
        raise
    return RunDir(path, changes, lock)


def to_plain(cfg: RunConfig) -> dict[str, Any]:
    """`cfg` as `SavedRun` would give it back: plain mappings, lists and scalars."""
    return json.loads(json.dumps(to_dict(cfg)))


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.yaml``; one with other values is first kept as ``config.before-N.yaml``."""
    path = run_dir / CONFIG_FILE_NAME
    body = config_text(config)
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if before.endswith("\n\n" + body):
            return
        number = 1 + len(list(run_dir.glob("config.before-*.yaml")))
        write_atomic(run_dir / f"config.before-{number}.yaml", before)
    write_atomic(path, _header() + "\n" + body)


def write_exit(run_dir: Path, code: ExitCode, reason: str, step: int | None) -> None:
    """Write ``exit.json``: how this process ends, why, and after which step (None before training began)."""
    content = {
        "code": int(code),
        "meaning": code.name.lower(),
        "reason": reason,
        "step": step,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_atomic(run_dir / EXIT_FILE_NAME, json.dumps(content | holder_info(), indent=1) + "\n")


def _check_present_run(path: Path, cfg: RunConfig, config: Mapping[str, Any]) -> list[Change]:
    if path.exists() and not path.is_dir():
        raise InputError(f"run.dir = {cfg.run.dir!r}: a file of that name exists.\n      fix: choose another run.dir")
    # Without a complete checkpoint nothing is resumed: a start that failed early may be mended and repeated here.
    if not any((path / "checkpoints").glob("step_*/COMPLETE")):
        return []
    if cfg.checkpoint.resume == "never":
        raise InputError(
            f"run.dir = {cfg.run.dir!r} holds the checkpoints of an earlier run, and checkpoint.resume=never would mix "
            "two runs in one folder.\n      fix: choose another run.dir, or checkpoint.resume=auto to go on"
        )
    saved = SavedRun.at(path)
    return check_agreement(saved.mapping, config, path / CONFIG_FILE_NAME, _blend_keys(saved, cfg, config))


def _blend_keys(saved: SavedRun, cfg: RunConfig, config: Mapping[str, Any]) -> Sequence[str]:
    """Keys of the blend that may change, since what the run has read so far stays as it was.

    Raises:
        ConfigError: the new blend would have given other samples.
    """
    found = find_checkpoint(saved.folder)
    if found is None or all(saved.mapping["data"][key] == config["data"][key] for key in _BLEND_KEYS):
        return ()
    try:
        before, consumed = saved.sections.data, (read_progress(found) or {})["consumed_samples"]
    except (ConfigError, CheckpointDamagedError, KeyError):  # not to be read: then nothing may change
        return ()
    if problems := list(check_blend_history(before, cfg.data, consumed)):
        raise ConfigError(problems)
    return [f"data.{key}" for key in _BLEND_KEYS]


def _make_new_folder(name: str) -> Path:
    safe_name = re.sub(r"[^\w.-]+", "_", name)
    while True:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        path = (Path(_DEFAULT_PARENT) / f"{safe_name}-{stamp}-{secrets.token_hex(2)}").absolute()
        if not path.exists():
            _make_folder(path)
            return path


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"run.dir = {str(path)!r} cannot be made: {error.strerror}") from None
    if not writable:
        raise InputError(
            f"run.dir = {str(path)!r} cannot be written to by this user.\n      fix: choose another run.dir"
        )


def _header() -> str:
    commit = git_commit(Path(__file__).resolve().parent)
    lines = [
        "Resolved configuration of this run, every key with the value in force.",
        f"started: {datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"command: {shlex.join(sys.orig_argv)}",
        f"versions: {', '.join(_versions())}",
        f"commit: {commit or 'not a git checkout'}",
    ]
    if image := os.environ.get("NEMO_LLM_IMAGE"):  # set by slurm/job.sh
        lines.append(f"image: {image}")
    # An argument may hold a line break, which must not end the comment.
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)


def _versions() -> list[str]:
    versions = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path) -> str | None:
    """Commit that `folder` is checked out at, with a mark when files differ from it; None outside of a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
