"""Atomic writing: what a reader sees when the writer is killed or fails."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from nemo_llm.checkpoint.folder import is_complete, writing
from nemo_llm.errors import InputError, NemoLlmError
from nemo_llm.storage.atomic_files import fsync, replacing, write_atomic, write_json, write_output
from nemo_llm.storage.locks import RunLock, is_locked
from nemo_llm.storage.unfinished_work import one_at_a_time, open_work

WRITER = """
import itertools, sys
from pathlib import Path
from nemo_llm.storage.atomic_files import write_atomic
for number in itertools.count():
    write_atomic(Path(sys.argv[1]), f"{number}\\n" * 20_000)
    print(number, flush=True)
"""


def test_replaces_content_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, "one")
    write_atomic(path, "zwei ä\n")
    assert path.read_text(encoding="utf-8") == "zwei ä\n"
    assert list(tmp_path.iterdir()) == [path]


def test_killed_writer_leaves_one_whole_version(tmp_path):
    path = tmp_path / "file"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for kill_after in (3, 5, 8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        while int(writer.stdout.readline()) < kill_after:
            pass
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        lines = path.read_text().splitlines()
        assert len(lines) == 20_000
        assert len(set(lines)) == 1


def test_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \udc80")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, code):
    """Writing goes on, a checkpoint's too; what fails on a file, or otherwise, is told."""
    real = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomic(tmp_path / "file", "text")
    with writing(tmp_path / "step_00000001") as folder:
        (folder / "config.yaml").write_text("a: 1")
    assert is_complete(tmp_path / "step_00000001")

    def fail(descriptor):
        raise OSError(code if not stat.S_ISDIR(os.fstat(descriptor).st_mode) else errno.EIO, "no")

    monkeypatch.setattr(os, "fsync", fail)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match="no"):
            fsync(path)


def test_every_way_of_replacing_a_file_syncs_the_file_and_then_its_folder(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def note(descriptor):
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_json(tmp_path / "a.json", {"b": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2]}
    with replacing(tmp_path / "c") as file:
        file.write(b"c")
    assert synced == ["file", "folder"] * 2
    with replacing(tmp_path / "d", sync=False) as file:
        file.write(b"d")
    assert len(synced) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "c", "d"]


def test_a_result_that_cannot_be_written_is_named_with_its_key(tmp_path):
    write_output("output", tmp_path / "new" / "rows", "ä\n")
    assert (tmp_path / "new" / "rows").read_text(encoding="utf-8") == "ä\n"
    with pytest.raises(InputError, match=r"report=.*rows/page: cannot be written \(.*exists"):
        write_output("report", tmp_path / "new" / "rows" / "page", "")


def no_locks_here(_descriptor, _how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_a_file_system_without_locks_stops_no_run_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", no_locks_here)
    monkeypatch.setattr("nemo_llm.storage.locks.get_logger", lambda name: __import__("logging").getLogger("here"))
    with RunLock(tmp_path, 0.0):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert "has no locks (Function not implemented)" in caplog.text
        assert not is_locked(tmp_path)


def test_other_work_in_the_same_folder_is_refused_until_restart(tmp_path):
    folder = tmp_path / "out.partial"
    open_work(folder, {"inputs": ("a", 1)}, restart=False)
    (folder / "done").touch()
    open_work(folder, {"inputs": ["a", 1]}, restart=False)  # a tuple is a list in JSON
    with pytest.raises(InputError, match=r"other inputs or settings.*restart=true"):
        open_work(folder, {"inputs": ["a", 2]}, restart=False)
    assert (folder / "done").exists()
    open_work(folder, {"inputs": ["a", 2]}, restart=True)
    assert not (folder / "done").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no space left .*is kept"), (errno.EROFS, "choose an output_prefix"), (errno.EIO, "error$")],
)
def test_a_disk_that_fails_is_said_with_what_to_do(tmp_path, code, words):
    with pytest.raises(InputError, match=words), one_at_a_time("output_prefix", tmp_path / "new" / "d", workers=2):
        raise OSError(code, os.strerror(code))
    assert not list((tmp_path / "new").iterdir())


def test_a_worker_that_was_killed_is_said_with_their_number(tmp_path):
    from concurrent.futures.process import BrokenProcessPool

    with pytest.raises(NemoLlmError, match="fewer workers than 3"), one_at_a_time("output", tmp_path / "d", workers=3):
        raise BrokenProcessPool
