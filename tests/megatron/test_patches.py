"""Each touch of Megatron-Core is declared, relies on text that is known, and has a reason that still holds."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.megatron.faults import FAULTS
from tests.megatron.patches import PATCHES, READ, Patch
from tests.megatron.sources import NAMES, digest, installed, recorded
from tests.ranks import RankPool
from tests.test_architecture import MODULES, ROOT, TREES, relative

named = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
# Private methods of Megatron's that a class of ours overrides or calls, by the patch that declares it.
OVERRIDDEN = {
    "model_steps": {"_preprocess", "_postprocess"},
    "router": {"_apply_expert_bias"},
    "parallel_residual": {"_forward_attention"},
}


def test_each_patch_is_declared_once() -> None:
    names = [patch.name for patch in PATCHES]
    assert len(names) == len(set(names))
    assert version("megatron-core").startswith(READ[0])
    for patch in PATCHES:
        assert set(patch.versions) <= set(READ)
        assert READ[0] in patch.versions, f"{patch.name}: no version that can be installed needs it"


@named
def test_what_does_it_exists(patch: Patch) -> None:
    module, _, name = patch.where.partition(":")
    nodes = TREES[ROOT / f"{module.replace('.', '/')}.py"].body
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert name in defined | {ast.unparse(target) for n in nodes if isinstance(n, ast.Assign) for target in n.targets}


@named
def test_megatron_has_the_text_that_was_read(patch: Patch) -> None:
    for name in patch.relies_on:
        fix = (
            f"megatron.core.{name} is not what `{patch.name}` was written for. Read it (python -m "
            "tests.megatron.sources FOLDER --text), mend the patch, then record it (--record)"
        )
        assert digest(installed(), name) == recorded().get(name), fix


def test_nothing_is_recorded_that_is_not_relied_on() -> None:
    assert sorted(recorded()) == NAMES


@pytest.fixture(scope="module")
def faults() -> dict[str, bool | str]:
    """What `tests.megatron.faults` finds in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.faults"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@named
def test_the_reason_still_holds(patch: Patch, faults: dict[str, bool | str]) -> None:
    if patch.name == "latent_projection":
        return  # below: it takes two ranks
    assert faults[patch.name] is True, f"{faults[patch.name]}\n{patch.drop}"


def test_each_reason_is_shown() -> None:
    assert FAULTS.keys() | {"latent_projection"} == {patch.name for patch in PATCHES}


def _norms_of_latent_attention(mended: bool) -> list[float]:
    from nemo_llm.models.layers import latent_attention
    from tests.models.test_latent_attention import LATENT
    from tests.parity.layouts import train_losses

    become = latent_attention.become
    if not mended:
        latent_attention.become = lambda *_: None
    try:
        overrides = ("parallelism.tensor_model_parallel_size=2",)
        return [norm for _, norm in train_losses("gpt_tiny", overrides, LATENT)]
    finally:
        latent_attention.become = become


def test_megatrons_latent_attention_still_forgets_heads_of_other_ranks(ranks: RankPool) -> None:
    mended, megatrons = (ranks.run(_norms_of_latent_attention, 2, mended)[0] for mended in (True, False))
    assert megatrons != pytest.approx(mended, rel=1e-5), "latent_projection is not needed any more"


def test_the_page_about_upgrades_has_a_row_for_each_patch() -> None:
    page = (ROOT / "docs/develop/upgrade-megatron.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == [patch.name for patch in PATCHES]


@cache
def _classes_of_megatron() -> dict[str, Path]:
    """The file of each class of Megatron's that a module of ours names as a base, by the class's name."""
    wanted = {base.id for tree in TREES.values() for base in _bases(tree)}
    files = {}
    for path in (installed() / "megatron" / "core").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        files |= {name: path for name in wanted if f"\nclass {name}(" in text}
    return files


def _bases(tree: ast.Module) -> Iterator[ast.Name]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (base for base in node.bases if isinstance(base, ast.Name))


def _private_methods(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_private_methods_of_megatron_are_used_where_it_is_declared() -> None:
    """Overrides of them and calls through ``self`` and ``super()``, in classes with one of Megatron's as a base."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.ClassDef):
                continue
            files = [_classes_of_megatron().get(base.id) for base in node.bases if isinstance(base, ast.Name)]
            private = set().union(*(_private_methods(file) for file in files if file is not None))
            used = {inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
            used |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
            if used & private:
                found[f"nemo_llm.{relative(path)[:-3].replace('/', '.')}:{node.name}"] = used & private
    assert found == {patch.where: OVERRIDDEN[patch.name] for patch in PATCHES if patch.name in OVERRIDDEN}
