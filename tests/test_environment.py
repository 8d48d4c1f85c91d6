"""Where the program cannot run, it says so in one sentence: another platform, or a Python without its packages."""

import subprocess
import sys

import pytest

from nemo_llm.environment import require_packages, require_platform
from tests.test_architecture import ROOT


@pytest.mark.parametrize(
    ("system", "machine", "words"),
    [
        ("darwin", "arm64", "macOS"),
        ("win32", "AMD64", "WSL2"),
        ("linux", "ppc64le", "ppc64le"),
        ("freebsd14", "amd64", "freebsd14"),
    ],
)
def test_other_platforms_are_refused_in_one_sentence(system: str, machine: str, words: str) -> None:
    with pytest.raises(ImportError, match=words) as caught:
        require_platform(system, machine)
    assert str(caught.value).startswith("nemo_llm runs on Linux (x86-64 or Arm), ")
    assert str(caught.value).count("\n") == 0


def test_linux_on_intel_and_arm_is_taken() -> None:
    for machine in ("x86_64", "aarch64", "arm64"):
        require_platform("linux", machine)
    require_packages(("sys", "json"))


@pytest.mark.parametrize("command", [["-m", "nemo_llm.train"], ["-m", "nemo_llm.generate"], ["tools/index_dataset.py"]])
def test_a_python_without_the_packages_ends_in_one_sentence(command: list[str]) -> None:
    """-S leaves site-packages out, as a shell does in which no environment is active."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-S", *command, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "hydra" in done.stderr
    assert "source .venv/bin/activate" in done.stderr


def test_a_command_on_another_platform_ends_in_one_sentence() -> None:
    code = "import runpy, sys; sys.platform = 'darwin'; sys.argv = ['-m']; runpy.run_module('nemo_llm.runs')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "macOS" in done.stderr
