"""For the Dockerfile: what to install on top of a base image, without touching the torch that the base has.

``python tools/image_requirements.py WANTED CONSTRAINTS`` writes the project's dependencies that the base lacks, and
pins: the lock's, but the base's own versions for what belongs to its torch. NVIDIA's torch calls itself 2.x.0a0+...,
which does not satisfy ``torch>=2.x``: so the project itself is installed with ``--no-deps`` and torch is not listed.
``--verify CONSTRAINTS`` fails when one of those has another version now.
"""

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Built against each other by whoever made the base. (The apex of PyPI is another package: it is never installed.)
OF_THE_BASE = re.compile(
    r"torch|torchvision|torchaudio|triton|pytorch-triton|transformer-engine.*|apex|nvidia-.*|cuda-.*|numpy"
)
NAME = re.compile(r"[A-Za-z0-9._-]+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="WANTED CONSTRAINTS, or CONSTRAINTS with --verify")
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    installed = {canonical(found.metadata["Name"]): found.version for found in metadata.distributions()}
    if arguments.verify:
        return verify(arguments.files[0], installed)
    wanted, constraints = arguments.files
    kept = {
        name: version for name, version in installed.items() if "torch" in installed and OF_THE_BASE.fullmatch(name)
    }
    wanted.write_text("".join(f"{line}\n" for line in dependencies() if canonical(name_of(line)) not in kept))
    pins = kept | {name: version for name, version in locked().items() if name not in kept and not belongs(name, kept)}
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
    print(f"of the base: {', '.join(f'{name} {version}' for name, version in sorted(kept.items())) or 'nothing'}")
    return 0


def belongs(name: str, kept: dict[str, str]) -> bool:
    """A package of torch's family that the base does without: the lock's pin would not fit the base's torch."""
    return bool(kept) and OF_THE_BASE.fullmatch(name) is not None


def verify(constraints: Path, installed: dict[str, str]) -> int:
    """Complain about each package of the base, torch above all, whose version the installation changed."""
    wrong = []
    for line in constraints.read_text().splitlines():
        name, _, version = line.partition("==")
        if OF_THE_BASE.fullmatch(name) and name in installed and installed[name] != version:
            wrong.append(f"{name}: {version} became {installed[name]}")
    if "torch" not in installed:
        wrong.append("torch is not installed")
    print("; ".join(wrong) or f"torch {installed['torch']} is as it was", file=sys.stderr if wrong else sys.stdout)
    return int(bool(wrong))


def dependencies() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def locked() -> dict[str, str]:
    version = "".join(map(str, sys.version_info[:2]))
    lines = (ROOT / "requirements" / f"lock-py{version}.txt").read_text().splitlines()
    return {canonical(name): pin for name, _, pin in (line.partition("==") for line in lines if "==" in line)}


def name_of(requirement: str) -> str:
    found = NAME.match(requirement)
    assert found is not None, requirement
    return found.group()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
