"""The CPU variant of the Dockerfile: really built; it trains as an ordinary user in a file system that is read-only."""

import json
import os
from pathlib import Path

import pytest

from tests.slurm.image import ImageStore, what_is_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
]


def test_the_image_trains_read_only_as_an_ordinary_user(tmp_path: Path) -> None:
    store = ImageStore(Path(os.environ.get("NEMO_LLM_IMAGES", tmp_path / "images")))
    store.build()
    assert store.run("id", "-u").stdout.strip() == "10001"
    work = tmp_path / "work"
    work.mkdir()
    os.chown(work, 10001, 10001)
    command = ["python", "-m", "nemo_llm.train", "+model=gpt_tiny", "trainer.max_steps=2", "run.dir=/work/run"]
    done = store.run(*command, options=("--read-only", "--tmpfs", "/tmp", f"--volume={work}:/work"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((work / "run/exit.json").read_text())["meaning"] == "done"
    assert (work / "run").stat().st_uid == 10001
    asked = store.run("python", "-m", "nemo_llm.health", "/tmp/health", "--run-dir", "/work")
    assert asked.returncode == 0, asked.stdout
