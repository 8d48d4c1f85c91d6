"""Is this node fit for a run? One process a node, before the work: ``python -m nemo_llm.health FOLDER --run-dir DIR``.

Writes ``FOLDER/<host>``: ``fit`` or ``unfit``, then what is wrong, then a fingerprint of code and packages that must be
the same on all nodes. Takes a second; torch is not imported.
"""

import argparse
import csv
import hashlib
import io
import os
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from nemo_llm.errors import ExitCode

_PACKAGE = Path(__file__).resolve().parent
_MIN_FREE_GIB = 1.0
_NVIDIA_SMI_SECONDS = 30
# Memory of a GPU in use before the run, in MiB: the driver's own share is below this.
_MAX_USED_MIB = 1024
_QUERY = "index,name,memory.used,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,pci.bus_id"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the verdict is written, as a file with the host's name")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder that the run will write to")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that this node must show")
    arguments = parser.parse_args()
    problems = list(disk_problems(arguments.run_dir, 0.0))  # its room is no property of the node: the job looks at it
    problems += disk_problems(Path(tempfile.gettempdir()), _MIN_FREE_GIB)
    if arguments.gpus:
        problems += gpu_problems(arguments.gpus)
    verdict = "unfit" if problems else "fit"
    host = socket.gethostname()
    text = f"{verdict}\n{'; '.join(problems) or '-'}\n{fingerprint()}\n"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / host).write_text(text, encoding="utf-8")
    print(f"{host}: {text}", end="")
    return ExitCode.FAILED if problems else ExitCode.DONE


def disk_problems(folder: Path, min_free_gib: float) -> Iterator[str]:
    """A folder that cannot be written to, or has no room left."""
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        yield f"{folder} cannot be written to"
        return
    free = shutil.disk_usage(folder).free / 2**30
    if free < min_free_gib:
        yield f"{folder} has {free:.2f} GiB free, less than {min_free_gib:g}"


def gpu_problems(wanted: int) -> list[str]:
    """What the driver says of the node's GPUs: missing, in use by others, memory errors, slowed down by hardware."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True).stdout
    except FileNotFoundError:
        return ["nvidia-smi is not installed, though the job has GPUs"]
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer within {_NVIDIA_SMI_SECONDS} s"]
    except subprocess.CalledProcessError as error:
        return [f"nvidia-smi failed: {' '.join((error.stdout + error.stderr).split())[:200]}"]
    return judge_gpus(shown, wanted)


def judge_gpus(shown: str, wanted: int) -> list[str]:
    """Problems in nvidia-smi's table, a row a GPU in the order of `_QUERY`."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(shown)) if row]
    problems = [] if len(rows) >= wanted else [f"{len(rows)} GPUs instead of {wanted}"]
    for index, _name, used, errors, slowed, _bus in rows:
        if used.isdecimal() and int(used) > _MAX_USED_MIB:
            problems.append(f"GPU {index}: {used} MiB in use by others")
        if errors.isdecimal() and int(errors):
            problems.append(f"GPU {index}: {errors} uncorrected memory errors")
        if slowed == "Active":
            problems.append(f"GPU {index}: clocks slowed down by hardware (heat or power)")
    return problems


def fingerprint() -> str:
    """Hash over our sources and the versions of all installed packages.

    Packages are looked for where the interpreter started, not in ``sys.path``: importing setuptools adds its own copies
    of others to that.
    """
    hashed = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        hashed.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    versions = {f"{found.metadata['Name']}=={found.version}" for found in metadata.distributions(path=folders)}
    hashed.update("\n".join(sorted(versions)).encode())
    return f"python {sys.version.split()[0]} code and packages {hashed.hexdigest()[:16]}"


if __name__ == "__main__":
    sys.exit(main())
