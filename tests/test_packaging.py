"""What a plain install brings, and that the locked versions still fit what pyproject.toml asks for."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(code: str, folder: Path, import_from: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(import_from)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which the built wheel is unpacked, as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_configuration_and_the_assets(installed):
    for source, inside in ((ROOT / "conf", "conf"), (ROOT / "nemo_llm" / "assets", "assets")):
        expected = {
            path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected, source
        missing = {path for path in expected if not (installed / "nemo_llm" / inside / path).is_file()}
        assert not missing


def test_an_installed_package_composes_a_run_from_any_folder(installed, tmp_path):
    code = (
        "from nemo_llm.config.compose.catalog import conf_dir; from nemo_llm.config.compose.load import compose; "
        "print(conf_dir()); print(compose(['+model=gpt_tiny']).model.name)"
    )
    folder, name = run_python(code, tmp_path, installed).split()
    assert Path(folder) == installed / "nemo_llm" / "conf"
    assert name == "gpt_tiny"


def test_importing_the_package_imports_neither_torch_nor_megatron(tmp_path):
    code = "import sys, nemo_llm; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run_python(code, tmp_path, ROOT).split())
    assert "nemo_llm" in loaded
    assert not loaded & {"torch", "megatron", "nemo", "hydra", "numpy", "transformers"}


def requirements_of(*extras: str) -> list[Requirement]:
    """Direct dependencies with those of `extras`, where an extra may name others of this project."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["name"]:
                found += requirements_of(*requirement.extras)[len(PROJECT["dependencies"]) :]
            else:
                found.append(requirement)
    return found


@pytest.mark.parametrize("version", ["311", "312"])
def test_the_lock_fits_every_dependency(version):
    lines = (ROOT / "requirements" / f"lock-py{version}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wrong = [
        str(requirement)
        for requirement in requirements_of("test", "wandb")
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]
    assert not wrong, "run tools/lock_requirements.py with Python 3.11 and with 3.12"
