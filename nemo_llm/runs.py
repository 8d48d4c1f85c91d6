"""List runs: ``python -m nemo_llm.runs [FOLDER ...]``, for example of all folders below ``runs/``.

State, step, loss, speed, time left, restarts and Slurm job of each, read from the run folders alone, and from Slurm
where it is there. Nothing is imported that takes time, and nothing is written.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm.errors import ExitCode
from nemo_llm.report.text import aligned, duration
from nemo_llm.storage.locks import LOCK_FILE_NAME, is_locked

_COLUMNS = ("run", "state", "step", "loss", "tokens/s", "time left", "starts", "job", "why")
_TAIL_BYTES = 1 << 16
_SLURM_SECONDS = 10


@dataclass(frozen=True)
class RunStatus:
    """One run as its folder tells it; None where it does not."""

    name: str
    state: str
    step: int
    max_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    starts: int
    job: str | None
    why: str

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            self.state,
            f"{self.step}/{self.max_steps}" if self.max_steps else str(self.step),
            "-" if self.loss is None else f"{self.loss:.4f}",
            "-" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
            "-" if self.seconds_left is None else duration(self.seconds_left),
            str(self.starts),
            self.job or "-",
            self.why,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs [runs]")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args(argv)
    missing = [str(folder) for folder in arguments.folders if not folder.is_dir()]
    if missing:
        print(f"no such folder: {', '.join(missing)}; name run folders, or folders that hold them", file=sys.stderr)
        return ExitCode.BAD_INPUT
    jobs = slurm_jobs()
    found = [read_run(path, jobs) for path in find_runs(arguments.folders)]
    if arguments.json:
        for status in found:
            print(json.dumps({field: getattr(status, field) for field in status.__dataclass_fields__}))
    else:
        print("\n".join(aligned([_COLUMNS, *(status.cells() for status in found)])) if found else "no runs")
    return ExitCode.DONE


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The folders that are runs, or lie one below and are, not checkpoints; the one written to last comes first."""
    candidates = {path.resolve() for folder in folders for path in (folder, *folder.iterdir()) if path.is_dir()}
    candidates -= {path for path in candidates if (path / "COMPLETE").is_file()}
    runs = [path for path in candidates if (path / "config.yaml").is_file() or (path / "slurm").is_dir()]
    return sorted(runs, key=last_written, reverse=True)


def last_written(run_dir: Path) -> float:
    names = ("metrics.jsonl", "config.yaml", "slurm")
    return max((path.stat().st_mtime for name in names if (path := run_dir / name).exists()), default=0.0)


def read_run(run_dir: Path, jobs: dict[str, str]) -> RunStatus:
    """Status of one run.

    Args:
        jobs: state of each Slurm job that the controller knows, from `slurm_jobs`.
    """
    rows = [row for row in tail_rows(run_dir / "metrics.jsonl") if "loss" in row]
    last: dict[str, Any] = rows[-1] if rows else {}
    attempts = tail_rows(run_dir / "slurm/attempts.jsonl")
    exit_info = read_json(run_dir / "exit.json")
    holder = read_json(run_dir / LOCK_FILE_NAME)
    job = newest_job(run_dir, attempts, holder, exit_info)
    state = find_state(run_dir, exit_info, jobs.get(job or ""))
    step, max_steps = int(last.get("step", 0)), configured_steps(run_dir)
    left = None
    if state == "running" and max_steps and last:
        left = (max_steps - step) * last["step_time_seconds"]
    why = ""
    if state not in ("running", "done"):
        why = str(exit_info.get("reason") or (attempts[-1]["reason"] if attempts else ""))
    starts = len(list(run_dir.glob("slurm/*/rank_0000.host"))) or int(bool(rows or exit_info or holder))
    return RunStatus(
        run_dir.name,
        state,
        step,
        max_steps,
        last.get("loss"),
        last.get("tokens_per_second"),
        left,
        starts,
        job,
        why[:80],
    )


def find_state(run_dir: Path, exit_info: dict[str, Any], slurm_state: str | None) -> str:
    """One word: running, queued, done, failed, preempted, ... or ``gone``: it ended without a word."""
    if is_locked(run_dir) or (slurm_state == "RUNNING" and not exit_info):
        return "running"
    if slurm_state in ("PENDING", "REQUEUED"):
        return "queued"
    if exit_info:
        return str(exit_info["meaning"])
    if slurm_state is None and time.time() - last_written(run_dir) < 60:
        return "running"  # on another node of a file system whose locks do not reach here
    return "gone"


def newest_job(run_dir: Path, attempts: Sequence[dict[str, Any]], *owners: dict[str, Any]) -> str | None:
    """Slurm job that worked here last."""
    folders = sorted((run_dir / "slurm").glob("*.*.*/"), key=lambda path: path.stat().st_mtime)
    if folders:
        return folders[-1].name.partition(".")[0]
    known = [owner["job_id"] for owner in owners if owner.get("job_id")] + [row["job"] for row in attempts[-1:]]
    return str(known[0]) if known else None


def slurm_jobs() -> dict[str, str]:
    """State of every job that the controller still knows; empty without Slurm."""
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--states=all", "--format=%A %T"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=True).stdout
        return dict(line.split()[:2] for line in shown.splitlines() if len(line.split()) > 1)
    return {}


def configured_steps(run_dir: Path) -> int | None:
    """``trainer.max_steps`` of ``config.yaml``, read as text: a YAML library would take longer than all the rest."""
    with contextlib.suppress(OSError, ValueError):
        for line in (run_dir / "config.yaml").read_text(encoding="utf-8").splitlines():
            if line.startswith("  max_steps: "):
                return int(line.partition(": ")[2])
    return None


def tail_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows at the end of a file of JSON lines."""
    rows = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        for line in file.read().split(b"\n"):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


if __name__ == "__main__":
    sys.exit(main())
