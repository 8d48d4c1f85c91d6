"""What each fault of a checkpoint ends in: ``python -m benchmarks.checkpoint_faults [--repeat 5] [--seed 1]``.

Every fault is made on a real run with three checkpoints, and then the run is started again. It must either go on from
the last good checkpoint with the losses of an undisturbed run, or end in an error that names the cause; anything else
counts as wrong. Full and read-only disks are real file systems where they can be mounted (as root, in a mount namespace
of the trial's own); otherwise the trial says that it was left out.
"""

import argparse
import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoint_kills import losses, newest, run
from nemo_llm.checkpoint.folder import find_checkpoint

_CLONE_NEWNS = 0x20000
_MS_PRIVATE_RECURSIVE = 0x44000
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_faults_"))
    bad = 0
    for fault, counts in trials(folder, arguments.repeat, arguments.seed, arguments.only).items():
        bad += sum(count for outcome, count in counts.items() if outcome.startswith("WRONG"))
        print(
            f"{fault:34} " + "; ".join(f"{count} x {outcome}" for outcome, count in sorted(counts.items())), flush=True
        )
    shutil.rmtree(folder)
    return int(bad > 0)


def trials(folder: Path, repeat: int, seed: int, only: list[str] | None = None) -> dict[str, Counter[str]]:
    """Make each fault ``repeat`` times; returns how each ended."""
    import nemo_llm.training.setup  # noqa: F401  once for all runs, which are forked from here

    choose = random.Random(seed)
    whole, halfway = folder / "whole", folder / "halfway"
    assert run(whole, 1, None) == 0, (whole / "log").read_text()[-3000:]
    for attempt in range(60, 400, 20):  # a run that was killed late enough to have two checkpoints
        shutil.rmtree(halfway, ignore_errors=True)
        run(halfway, 1, attempt)
        if len(list((halfway / "checkpoints").glob("step_*"))) >= 2 and newest(halfway) < 10:
            break
    table: dict[str, Counter[str]] = {}
    for name, fault in FAULTS.items():
        if only and name not in only:
            continue
        table[name] = Counter()
        for number in range(repeat):
            trial = folder / f"trial_{number}"
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(halfway, trial)
            (trial / "log").unlink()
            table[name][fault(trial, choose, whole)] += 1
            shutil.rmtree(trial, ignore_errors=True)
    return table


def go_on(trial: Path, whole: Path) -> str:
    """Start the run again; how it ended."""
    before = newest(trial)
    code = run(trial, 1, None)
    log = (trial / "log").read_text()
    if code == 0:
        if losses(trial) != losses(whole):
            return "WRONG: other losses than undisturbed"
        passed = " and passed over the damaged one, naming the file" if "passed over" in log else ""
        return f"recovered{passed}" if before else "started anew, no checkpoint was left"
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    return (
        f"clear error (exit {code})"
        if code in (1, 2) and "Traceback" not in log
        else f"WRONG: exit {code}: {last[:150]}"
    )


def truncated(trial: Path, choose: random.Random, whole: Path) -> str:
    file = some_file(trial, choose)
    os.truncate(file, choose.randrange(file.stat().st_size))
    return go_on(trial, whole)


def flipped(trial: Path, choose: random.Random, whole: Path) -> str:
    file = some_file(trial, choose)
    with file.open("r+b") as stream:
        place = choose.randrange(file.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0] ^ (1 << choose.randrange(8))
        stream.seek(place)
        stream.write(bytes([byte]))
    return go_on(trial, whole)


def missing(trial: Path, choose: random.Random, whole: Path) -> str:
    some_file(trial, choose).unlink()
    return go_on(trial, whole)


def lost_marker(trial: Path, _choose: random.Random, whole: Path) -> str:
    found = find_checkpoint(trial)
    assert found is not None
    (found / "COMPLETE").unlink()
    return go_on(trial, whole)


def all_damaged(trial: Path, choose: random.Random, whole: Path) -> str:
    for folder in (trial / "checkpoints").glob("step_*"):
        os.truncate(max((folder / "state").glob("*.distcp")), choose.randrange(100))
    return go_on(trial, whole)


def killed_writer(trial: Path, choose: random.Random, whole: Path) -> str:
    assert run(trial, 1, choose.randint(20, 60)) != 0
    return go_on(trial, whole)


def clock_jump(trial: Path, choose: random.Random, whole: Path) -> str:
    for file in trial.rglob("*"):
        moment = choose.choice([0, 1, 2**31 - 1, 4102444800])
        os.utime(file, (moment, moment))
    return go_on(trial, whole)


def two_runs(trial: Path, _choose: random.Random, whole: Path) -> str:
    with (trial / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = content(trial)
        code = run(trial, 1, None)
    log = (trial / "log").read_text()
    if content(trial) != before:
        return f"WRONG: the second run changed {set(content(trial)) ^ set(before)}"
    if code != 2 or "is in use by" not in log:
        return f"WRONG: the second run ended with {code}"
    return f"the second is refused (exit 2); the first then {go_on(trial, whole)}"


def content(trial: Path) -> list[tuple[str, int]]:
    """Names and sizes of what a run owns; the index of its data is shared between runs."""
    return sorted(
        (str(path), path.stat().st_size)
        for path in trial.rglob("*")
        if path.is_file() and path.name != "log" and trial / "cache" not in path.parents
    )


def full_disk(trial: Path, choose: random.Random, whole: Path) -> str:
    def mount(place: Path) -> None:
        used = sum(path.stat().st_size for path in trial.rglob("*") if path.is_file())
        newest_one = find_checkpoint(trial)
        assert newest_one is not None
        one = sum(path.stat().st_size for path in newest_one.rglob("*") if path.is_file())
        size = (
            used + 200_000 + int(choose.uniform(0, 1.2) * one)
        )  # room for the rest of the run, and for up to one checkpoint
        command(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)])
        command(["cp", "-a", f"{trial}/.", str(place)])

    return in_namespace(trial, whole, mount)


def read_only_disk(trial: Path, _choose: random.Random, whole: Path) -> str:
    def mount(place: Path) -> None:
        command(["mount", "--bind", str(trial), str(place)])
        command(["mount", "-o", "remount,bind,ro", str(place)])

    return in_namespace(trial, whole, mount)


def in_namespace(trial: Path, whole: Path, mount: Callable[[Path], None]) -> str:
    """Start the run on a file system that only this trial sees, then again on the old one."""
    place = trial.with_name("mounted")
    place.mkdir(exist_ok=True)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        outcome = "left out: no right to mount here"
        with contextlib.suppress(Exception):
            if _libc.unshare(_CLONE_NEWNS) == 0 and _libc.mount(b"none", b"/", None, _MS_PRIVATE_RECURSIVE, None) == 0:
                mount(place)
                log = place.with_name("mounted.log")
                with contextlib.suppress(FileNotFoundError):
                    log.unlink()
                code = run(place, 1, None, log)
                text = log.read_text()
                clear = (
                    code in (1, 2)
                    and "Traceback" not in text
                    and ("disk" in text or "cannot be" in text or "No space" in text)
                )
                outcome = f"clear error (exit {code})" if clear else f"WRONG: exit {code}: {text[-300:]!r}"
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as stream:
        outcome = stream.read()
    return outcome if outcome.startswith(("left", "WRONG")) else f"{outcome}, then {go_on(trial, whole)}"


def command(arguments: list[str]) -> None:
    subprocess.run(arguments, check=True, capture_output=True)


def some_file(trial: Path, choose: random.Random) -> Path:
    """Any file of the newest checkpoint that has bytes, but for the marker."""
    found = find_checkpoint(trial)
    assert found is not None
    files = sorted(
        path for path in found.rglob("*") if path.is_file() and path.stat().st_size and path.name != "COMPLETE"
    )
    return choose.choice(files)


FAULTS: dict[str, Callable[[Path, random.Random, Path], str]] = {
    "truncated file": truncated,
    "flipped bit": flipped,
    "missing file": missing,
    "lost marker": lost_marker,
    "every checkpoint damaged": all_damaged,
    "killed writer": killed_writer,
    "clock jumps (times of all files)": clock_jump,
    "two runs on one folder": two_runs,
    "full disk": full_disk,
    "read-only disk": read_only_disk,
}


if __name__ == "__main__":
    sys.exit(main())
