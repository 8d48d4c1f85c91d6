"""A lock file for building something once, on local disks and on shared file systems alike.

Correctness never rests on it: what is built under it is published by one atomic rename, so a second builder only wastes
time. It is created with ``O_EXCL`` (atomic on NFS since version 3, where ``flock`` may be local to a node) and its
owner touches it every second; a lock whose owner is dead or silent is taken over.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HEARTBEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # an owner on another node that has not touched the lock for so long is taken for dead
_POLL_SECONDS = 0.05


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
