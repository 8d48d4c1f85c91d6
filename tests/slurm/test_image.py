"""The CPU variant of the Dockerfile: really built; it trains as an ordinary user in a file system that is read-only."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.slurm_faults import OPTIONS
from tests.slurm import cluster as slurm
from tests.slurm.image import ROOT, ImageStore, what_is_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or ""),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    store = ImageStore(Path(os.environ.get("NEMO_LLM_IMAGES", tmp_path_factory.mktemp("images"))))
    store.build()
    return store


def test_the_image_trains_read_only_as_an_ordinary_user(store: ImageStore, tmp_path: Path) -> None:
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


@pytest.mark.slurm
@pytest.mark.skipif(slurm.what_is_missing() is not None, reason=slurm.what_is_missing() or "")
@pytest.mark.skipif(not Path("/usr/include/slurm/spank.h").exists(), reason="Debian's libslurm-dev is not installed")
def test_the_image_trains_as_a_slurm_job(store: ImageStore, tmp_path: Path) -> None:
    """Two nodes of one rank, each in the image, through the options of pyxis; everything outside is mounted in."""
    root = store.mount()  # before the nodes begin, which see no later mounts
    with slurm.Cluster(tmp_path / "cluster", 2, containers=True) as cluster:
        command = [
            "bash", str(ROOT / "slurm/pretrain.sh"), "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1",
            f"--output={tmp_path}/%j.out", f"--image={root}", *OPTIONS, f"run.dir={tmp_path}/run",
            "trainer.max_steps=4",
        ]  # fmt: skip
        environment = cluster.environment | {"NEMO_LLM_PYTHON": "/opt/nemo_llm/bin/python", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        job_id = next(line.split()[3] for line in done.stdout.splitlines() if line.endswith(" submitted"))
        job = cluster.wait(job_id, timeout=600)
    output = (tmp_path / f"{job_id}.out").read_text()
    assert job["JobState"] == "COMPLETED", output
    assert json.loads((tmp_path / "run/exit.json").read_text())["step"] == 4
    own = store.run("python", "-c", "import platform; print(platform.python_version())").stdout.strip()
    assert f"versions: python {own}," in (tmp_path / "run/config.yaml").read_text()
