"""The look at a node before the work."""

import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from nemo_llm.health import disk_problems, fingerprint, judge_gpus
from tests.test_architecture import ROOT

GOOD = "0, NVIDIA H100 80GB HBM3, 0, 0, Not Active, 00000000:00:06.0\n"


def test_a_node_that_is_fit_says_so_with_its_fingerprint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_llm.health", str(tmp_path / "health"), "--run-dir", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (written,) = (tmp_path / "health").iterdir()
    assert written.read_text().splitlines() == ["fit", "-", fingerprint()]


def test_the_fingerprint_is_of_what_is_installed_not_of_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.syspath_prepend(str(Path(setuptools.__file__).parent / "_vendor"))  # as importing setuptools does
    assert fingerprint() == before
    monkeypatch.setenv("PYTHONPATH", str(Path(setuptools.__file__).parent / "_vendor"))
    assert fingerprint() != before


def test_missing_gpus_make_a_node_unfit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_llm.health", str(tmp_path), "--run-dir", str(tmp_path), "--gpus", "999"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unfit" in done.stdout


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GOOD, []),
        (GOOD.replace(", 0, 0,", ", 30000, 0,"), ["GPU 0: 30000 MiB in use by others"]),
        (GOOD.replace(", 0, 0,", ", 0, 2,"), ["GPU 0: 2 uncorrected memory errors"]),
        (GOOD.replace("Not Active", "Active"), ["GPU 0: clocks slowed down by hardware (heat or power)"]),
        (GOOD.replace(", 0, 0,", ", [N/A], [N/A],"), []),
        ("", ["0 GPUs instead of 1"]),
    ],
)
def test_what_the_driver_says_is_judged(row: str, said: list[str]) -> None:
    assert judge_gpus(row, 1) == said


def test_a_full_disk_is_a_problem(tmp_path: Path) -> None:
    assert list(disk_problems(tmp_path, 0.0)) == []
    assert "GiB free, less than" in next(iter(disk_problems(tmp_path, 1e9)))
