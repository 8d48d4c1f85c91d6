"""Locks on folders: one process at a time in a run folder, one at a time that builds something.

`RunLock` refuses a second run for as long as the first one lives. It is the kernel's ``flock``, which is gone with its
process, so that nothing stale is ever left behind; some file systems keep it local to a node or have none.

`build_lock` waits, also for a process of another node. It is a file created with ``O_EXCL`` (atomic on NFS since
version 3) whose owner touches it every second; a lock whose owner is dead or silent is taken over. What is built under
it is published by one atomic rename, so that a second builder, should there ever be one, only wastes time.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from nemo_llm.errors import RunBusyError
from nemo_llm.log import get_logger

HEARTBEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # an owner on another node that has not touched the lock for so long is taken for dead
LOCK_FILE_NAME = ".lock"

_POLL_SECONDS = 0.05
_RETRY_SECONDS = 0.2
# Errors of file systems that have no locks: Lustre mounted without `flock`, some FUSE file systems.
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def flock(descriptor: int, how: int) -> str | None:
    """``fcntl.flock``; where the file system has no locks, why not, as its error says it.

    Raises:
        BlockingIOError: another process holds the lock, and ``how`` has ``LOCK_NB``.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return os.strerror(error.errno)
    return None


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
                if missing := flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    get_logger(__name__).warning(
                        "%s: this file system has no locks (%s); a second run in the folder would not be noticed",
                        self.path.parent,
                        missing,
                    )
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RunBusyError(self._refusal()) from None
                time.sleep(_RETRY_SECONDS)

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


def is_locked(run_dir: Path) -> bool:
    """True while a process on this machine (or any, where the file system's locks reach) holds a run folder."""
    try:
        with (run_dir / LOCK_FILE_NAME).open("r") as file:
            flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _process_start(pid: int) -> str | None:
    """Return a token that changes when a pid is reused (its start time); None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"  # no /proc here: fall back on the heartbeat
    return None if fields[0] == "Z" else fields[19]


def _owner_text() -> str:
    pid = os.getpid()
    nonce = f"{threading.get_ident()}-{time.monotonic_ns()}"
    return json.dumps({"host": _host_name(), "pid": pid, "start": _process_start(pid), "nonce": nonce})


def _host_name() -> str:
    try:  # containers may share a host name but not a boot and pid namespace
        namespace = str(os.stat("/proc/self/ns/pid").st_ino) + Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace.strip()}"


def _dead_owner(path: Path, first_seen: dict[float, float]) -> str | None:
    """Return the lock's text if its owner has died or has stayed silent as seen by our own clock, else None."""
    try:
        changed = path.stat().st_mtime
        text = path.read_text()
        owner = json.loads(text)
    except FileNotFoundError:
        return None
    except ValueError:
        owner = {}  # only where hard links are missing: killed between creating the lock and writing to it
    if owner.get("host") == _host_name() and owner["start"] != "unknown":
        return text if _process_start(owner["pid"]) != owner["start"] else None
    # Clocks of nodes differ: wait for a change of the time stamp on our own clock instead of comparing it with ours.
    seen = first_seen.setdefault(changed, time.monotonic())
    silent = HEARTBEAT_SECONDS * 3 if not owner else SILENT_SECONDS
    return text if time.monotonic() - seen > silent else None


def _break(path: Path, dead: str) -> None:
    """Take a dead owner's lock away, and only that: another waiter may have replaced it in the meantime."""
    grave = path.with_name(f"{path.name}.dead-{os.getpid()}-{time.monotonic_ns()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(grave)
        if grave.read_text() != dead:
            with contextlib.suppress(OSError):
                os.link(grave, path)
        grave.unlink()


def _try_create(path: Path) -> bool:
    # The content is written before the lock appears: a link to a complete file cannot be seen half-written.
    draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    draft.write_text(_owner_text())
    try:
        os.link(draft, path)
    except (FileExistsError, FileNotFoundError):  # locked, or the draft was swept away
        return False
    except OSError:  # no hard links on this file system
        return _try_create_exclusive(path)
    finally:
        draft.unlink(missing_ok=True)
    return True


def _try_create_exclusive(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as stream:
        stream.write(_owner_text())
    return True


@contextlib.contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the body runs, waiting for another owner first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first_seen: dict[float, float] = {}
    while not _try_create(path):
        dead = _dead_owner(path, first_seen)
        if dead is not None:
            _break(path, dead)
        else:
            time.sleep(_POLL_SECONDS)
    _sweep(path)
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        path.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes that died while trying for the lock left beside it."""
    for left_over in path.parent.glob(f"{path.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            try:
                owner = json.loads(left_over.read_text())
                dead = owner["host"] == _host_name() and _process_start(owner["pid"]) != owner["start"]
            except ValueError:  # half-written, by a process that has not gone on for a while
                dead = False
            if dead or time.time() - left_over.stat().st_mtime > 10 * SILENT_SECONDS:
                left_over.unlink()


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
