"""What texts and earlier releases call a file or a module exists, or leads to what does."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_llm.old_names import renamed_modules

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.name for path in (ROOT / "nemo_llm").iterdir() if path.is_dir() and path.name.isidentifier())
TEXTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "*.toml", "Dockerfile", ".ci/*", "conf/**/*.yaml")
    for path in ROOT.glob(pattern)
] + [
    path
    for folder in ("nemo_llm", "tools", "slurm", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".sh"} and "runs" not in path.parts and path.name not in {"make_runs.py", "test_names.py"}
]
# A path from the top, or one below the package that begins with a room: models/specs.py.
PATH = re.compile(
    rf"(?<![\w./{{}}-])((?:nemo_llm|tools|tests|benchmarks|slurm)/[\w/]+\.(?:py|sh)|(?:{'|'.join(ROOMS)})/[\w/]+\.py)\b"
)
# Files that the examples in docs/develop/ would make.
NEW_FILES = {
    path
    for page in (ROOT / "docs" / "develop").glob("*.md")
    for path in re.findall(r"^--- /dev/null\n\+\+\+ b/(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
NEW_MODULES = {path.removesuffix(".py").replace("/", ".") for path in NEW_FILES}
MODULE = re.compile(r"(?<![\w./_-])nemo_llm(?:\.[a-z_0-9]+)+")
NOT_OURS = {
    "slurm/site.sh",  # the user's own
    "nemo_llm/config/migrations/mYYYY_MM_DD_slug.py",
    *("tools/preprocess_data.py", "megatron/training/arguments.py"),  # Megatron-LM's
    "nemo_llm.somewhere",  # a logger of a test
    *("nemo_llm.sqsh", "nemo_llm.sif", "nemo_llm.__version__", "nemo_llm.__file__"),
}


def _exists(path: str) -> bool:
    return (ROOT / path).is_file() or (ROOT / "nemo_llm" / path).is_file()


def _is_module(name: str) -> bool:
    """Whether the dotted name, or the name without one or two last pieces (a function, a method), is a file."""
    pieces = name.split(".")
    found = [ROOT.joinpath(*pieces[:end]) for end in range(len(pieces), max(len(pieces) - 3, 0), -1)]
    return any(path.with_suffix(".py").is_file() or (path.is_dir() and path == found[0]) for path in found)


def test_every_path_and_module_that_is_named_exists() -> None:
    wrong = []
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        missing = {path for path in PATH.findall(text) if not _exists(path)}
        missing |= {name for name in MODULE.findall(text) if not _is_module(name)}
        wrong += [f"{file.relative_to(ROOT)}: {name}" for name in missing - NOT_OURS - NEW_FILES - NEW_MODULES]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "develop").glob("add-*.md")), ids=lambda page: page.stem)
def test_the_example_of_a_page_fits_the_files_as_they_are(page: Path) -> None:
    """What it adds stands in the page alone, so nothing else would show that it has become old."""
    (example,) = re.findall(r"^```diff\n(.+?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    command = ["git", "apply", "--check", "-C1"]
    done = subprocess.run(command, input=example, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page.name}: carry the example out by hand, and write it anew: {done.stderr}"


def test_a_module_under_its_old_name_is_found_with_a_warning() -> None:
    for old, new in renamed_modules().items():
        path = ROOT.joinpath(*old.split("."))
        assert not path.with_suffix(".py").exists(), f"{old} is a module again"
        assert _is_module(new), new
    with pytest.warns(FutureWarning, match=r"nemo_llm\.data\.rules is now nemo_llm\.data\.sampling\.window_to_sample"):
        old_module = importlib.import_module("nemo_llm.data.rules")
    try:
        assert old_module is importlib.import_module("nemo_llm.data.sampling.window_to_sample")
    finally:
        del sys.modules["nemo_llm.data.rules"]
    with pytest.raises(ModuleNotFoundError, match="no_such_room"):
        importlib.import_module("nemo_llm.no_such_room")
