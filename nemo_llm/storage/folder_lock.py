"""One process at a time in a run folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from nemo_llm.errors import RunBusyError
from nemo_llm.log import get_logger

LOCK_FILE_NAME = ".lock"

_RETRY_SECONDS = 0.2
# Errors of file systems that have no locks: Lustre mounted without `flock`, some FUSE file systems.
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def holder_info() -> dict[str, Any]:
    """Who this process is: host, pid and Slurm job (None outside of one)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID")}


class RunLock:
    """Exclusive lock on a run folder, held until `release` or the end of the process, however it ends.

    An advisory ``flock`` on ``<run_dir>/.lock``, whose content says who holds it. The kernel gives it back when a
    process is killed, so that nothing stale is ever left behind.
    """

    def __init__(self, run_dir: Path, wait_seconds: float):
        """Take the lock; a process that is just ending is waited for.

        Raises:
            RunBusyError: another run still holds the folder after `wait_seconds`; the message says which.
        """
        self.path = run_dir / LOCK_FILE_NAME
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(time.monotonic() + wait_seconds)
        except BaseException:
            self._close()
            raise
        # A forked child (data loader, checkpoint writer) would keep the lock beyond its parent's death.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(reference))
        self._write(holder_info() | {"since": datetime.now().astimezone().isoformat(timespec="seconds")})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        if self._descriptor is not None:
            self._write(None)
            # The file stays: removing it would let two processes lock two files of the same name.
            self._close()

    def _take(self, deadline: float) -> None:
        assert self._descriptor is not None
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RunBusyError(self._refusal()) from None
                time.sleep(_RETRY_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS_HERE:
                    raise
                get_logger(__name__).warning(
                    "%s: this file system has no locks (%s); a second run in the folder would not be noticed",
                    self.path.parent,
                    error.strerror,
                )
                return

    def _refusal(self) -> str:
        folder = self.path.parent
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            job = f", Slurm job {holder['job_id']}" if holder["job_id"] else ""
            who = f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
        except (ValueError, KeyError, TypeError):  # the holder is between taking the lock and writing its name
            who = "another process"
        return (
            f"run.dir = {str(folder)!r} is in use by {who}.\n"
            "      fix: wait for that run or stop it, or choose another run.dir"
        )

    def _write(self, holder: dict[str, Any] | None) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        if holder is not None:
            os.pwrite(self._descriptor, (json.dumps(holder) + "\n").encode(), 0)

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _close_in_child(reference: "weakref.ref[RunLock]") -> None:
    lock = reference()
    if lock is not None:
        with contextlib.suppress(OSError):
            lock._close()
