"""The Triton kernels against float64, in Triton's interpreter: it must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def test_kernels_agree_with_float64() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.kernel_checks", "cpu"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 67
