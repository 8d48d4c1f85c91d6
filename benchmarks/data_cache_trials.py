"""Many processes open the same raw text on an empty cache at once, and some are killed: one build, no corruption.

    python benchmarks/data_cache_trials.py --trials 200 --processes 4

Each trial starts processes at random moments, kills up to half of them with SIGKILL at random moments, and lets a last
one run after them. It counts how many builds were finished, and compares the bytes with a build made alone.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A build of some tenths of a second, noted in a file by whoever finishes it. Nothing but nemo_llm.storage.build_cache is
# needed, so that a process starts fast and a trial is mostly race.
_PROCESS = """
import os, sys, time
from pathlib import Path
from nemo_llm.storage.build_cache import build_once
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def build(temporary):
    for part in range(5):
        with (temporary / f"part{part}").open("wb") as stream:
            for block in range(20):
                stream.write(bytes([part, block]) * 5000)
                time.sleep(0.003)
    with log.open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    return {"answer": 42}
manifest = build_once(folder, build)
assert manifest["answer"] == 42
for part in range(5):
    data = (folder / f"part{part}").read_bytes()
    assert data == b"".join(bytes([part, block]) * 5000 for block in range(20)), part
"""


def trial(folder: Path, processes: int, choose: random.Random) -> dict:
    """Run one race; return what happened. Raises AssertionError for anything but one whole result."""
    cache, log = folder / "cache" / "entry", folder / "built"
    command = [sys.executable, "-c", _PROCESS, str(cache), str(log)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running, killed = [], 0
    for number in range(processes):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + choose.uniform(0.1, 0.6) if number < processes // 2 else None
        running.append((process, deadline))
        time.sleep(choose.uniform(0, 0.05))
    for process, deadline in running:
        if deadline is not None:
            time.sleep(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
    codes = [process.wait() for process, _ in running]
    assert all(code in (0, -signal.SIGKILL) for code in codes), codes
    last = subprocess.run(command, env=environment, check=False)
    assert last.returncode == 0
    # A builder killed after its build but before the rename is the one case of a second build.
    built = log.read_text().split()
    left = [path for path in cache.parent.iterdir() if path.name != "entry"]
    assert all(path.stat().st_size == 0 for path in left), left  # an empty file of one killed in its first microsecond
    digest = hashlib.sha256()
    for path in sorted(cache.iterdir()):
        if path.name != "manifest.json":
            digest.update(path.read_bytes())
    return {"killed": killed, "builds": len(built), "sha256": digest.hexdigest()}


def main() -> None:
    """Run the trials and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    choose = random.Random(options.seed)
    began = time.monotonic()
    results = []
    for _ in range(options.trials):
        folder = Path(tempfile.mkdtemp())
        results.append(trial(folder, options.processes, choose))
        shutil.rmtree(folder)
    hashes = {result["sha256"] for result in results}
    assert len(hashes) == 1
    unkilled = [result for result in results if not result["killed"]]
    print(
        f"{len(results)} trials of {options.processes + 1} processes, {sum(r['killed'] for r in results)} killed, in "
        f"{time.monotonic() - began:.0f} s: no corruption, one content; builds a trial: at most "
        f"{max(r['builds'] for r in results)}, {sum(r['builds'] > 1 for r in results)} trials with more than one, "
        f"{sum(r['builds'] > 1 for r in unkilled)} of them without a kill"
    )


if __name__ == "__main__":
    main()
