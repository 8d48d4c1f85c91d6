"""Atomic writing: what a reader sees when the writer is killed or fails."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from nemo_llm.checkpoint.folder import is_complete, writing
from nemo_llm.storage.atomic_files import fsync, write_atomic

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
