"""Where nemo_llm can run, and whether what it needs is installed: asked once, before anything else is imported."""

import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
_ELSEWHERE = {
    "darwin": "not on macOS: use a Linux machine, or a container (the Dockerfile builds one)",
    "win32": "not on Windows: use WSL2, where it runs as on Linux, or a container (the Dockerfile builds one)",
}


def require_platform(system: str = sys.platform, machine: str = "") -> None:
    """End the program with one sentence where it cannot run.

    Args:
        system: in the words of `sys.platform`.
        machine: in the words of `platform.machine`; empty takes this one's.

    Raises:
        SystemExit: with code 2, when a command was started; ImportError when something else imports the package.
    """
    machine = machine or platform.machine()
    if system == "linux" and machine.lower() in _MACHINES:
        return
    here = _ELSEWHERE.get(system, f"not on {system} ({machine}): use such a machine, or a container on one")
    _end(f"nemo_llm runs on Linux (x86-64 or Arm), {here}.")


def require_packages(packages: Sequence[str]) -> None:
    """End the program with one sentence when packages cannot be imported; raises as `require_platform` does."""
    if missing := [name for name in packages if find_spec(name) is None]:
        _end(
            f"{sys.executable} does not have {', '.join(missing)}: activate the environment that nemo_llm was "
            "installed in (source .venv/bin/activate), or install it (pip install -e .)."
        )


def _end(sentence: str) -> None:
    # While Python looks for the module of ``python -m``, the first argument is "-m"; then it is the module's file.
    started = sys.argv[0] if sys.argv else ""
    if started == "-m" or Path(started).parent.name in ("nemo_llm", "tools"):
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(sentence)
