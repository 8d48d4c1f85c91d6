"""The text of what this project relies on in Megatron-Core (`Patch.relies_on`), read from files without importing them.

``python -m tests.megatron.sources FOLDER`` compares another version, unpacked, with the one that is installed: FOLDER
holds ``megatron/core``. ``--record`` writes digests of the installed version into sources.json, once it was read.
"""

import argparse
import ast
import difflib
import hashlib
import importlib.util
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

from tests.megatron.patches import PATCHES

RECORDED = Path(__file__).with_name("sources.json")
NAMES = sorted({name for patch in PATCHES for name in patch.relies_on})


def installed() -> Path:
    """The folder that holds ``megatron/core``."""
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    places = map(Path, spec.submodule_search_locations or ())
    return next(place.parent for place in places if (place / "core").is_dir())


@cache
def _tree(path: Path) -> tuple[str, ast.Module]:
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def source(root: Path, name: str) -> str | None:
    """The text of ``module:name`` below ``megatron.core``; None where it is gone."""
    module, _, inside = name.partition(":")
    base = root / "megatron" / "core" / module.replace(".", "/")
    path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    if not path.is_file():
        return None
    text, node = _tree(path)
    body: list[ast.stmt] = node.body
    for part in inside.split("."):
        found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not found:
            return None
        body = found[-1].body
    return ast.get_source_segment(text, found[-1])


def digest(root: Path, name: str) -> str | None:
    text = source(root, name)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def recorded() -> dict[str, str]:
    """Digests of the installed version, by name."""
    return json.loads(RECORDED.read_text(encoding="utf-8")).get(version("megatron-core"), {})


def _changes(other: Path, with_text: bool) -> None:
    here = installed()
    for patch in PATCHES:
        print(f"{patch.name} ({patch.where})")
        for name in patch.relies_on:
            old, new = source(here, name), source(other, name)
            print(f"  {'gone' if new is None else 'same' if old == new else 'changed'}: {name}")
            if with_text and old is not None and new is not None and old != new:
                lines = difflib.unified_diff(old.split("\n"), new.split("\n"), "installed", str(other), lineterm="")
                print("\n".join(f"    {line}" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--text", action="store_true", help="show what changed")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    if arguments.record:
        known = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
        known[version("megatron-core")] = {name: digest(installed(), name) for name in NAMES}
        RECORDED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    else:
        _changes(arguments.folder, arguments.text)


if __name__ == "__main__":
    main()
