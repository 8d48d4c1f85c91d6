"""``tools/prepare_data.py executor=slurm`` on a real Slurm cluster of emulated nodes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from tests.data.test_prepare import CHAPTERS, TOOL, documents, write_jsonl
from tests.slurm.cluster import Cluster, what_is_missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
]


@pytest.mark.slow
def test_stages_are_array_jobs_that_wait_for_each_other(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in CHAPTERS[:60] * 2])
    arguments = [
        f"input={source}", f"output={tmp_path}/out", "data_prep=dedup_only", "data_prep.minhash=null", "tasks=2",
        "executor=slurm", "slurm.partition=main", "slurm.time=0:10:00",
    ]  # fmt: skip
    with Cluster(tmp_path / "cluster", num_nodes=1) as cluster:

        def call() -> str:
            done = subprocess.run(
                [sys.executable, str(TOOL), *arguments],
                env=cluster.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        assert "6 array jobs" in call()
        until = time.monotonic() + 500
        while not (tmp_path / "out").exists():
            states = cluster.command("squeue", "-h", "-o", "%j %T %r")
            assert "DependencyNeverSatisfied" not in states, logs(tmp_path)
            assert time.monotonic() < until, states + logs(tmp_path)
            time.sleep(1)
        assert "120 of" not in call()  # tells what came out, and tidies up
    assert sorted(record["text"] for record in documents(tmp_path / "out")) == sorted(CHAPTERS[:60])
    assert json.loads((tmp_path / "out/report.json").read_text())["output"]["documents"] == 60
    assert not (tmp_path / "out.partial").exists()


def logs(folder: Path) -> str:
    """The ends of all jobs' logs."""
    return "\n".join(
        path.read_text(errors="replace")[-1500:] for path in folder.glob("out.partial/logs/*/slurm_logs/*")
    )
