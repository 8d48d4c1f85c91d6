"""Modules under the names that they had before: an import finds them, with a warning that gives the new name."""

import importlib
import sys
import warnings
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


@cache
def renamed_modules() -> dict[str, str]:
    """New name by old name, from ``old_names.txt``: two dotted names a line."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return {f"{__package__}.{old}": f"{__package__}.{new}" for old, new in map(str.split, lines)}


class _RenamedModule(Loader):
    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the empty one that the import system made."""
        new = renamed_modules()[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}; please import that", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


class OldNames(MetaPathFinder):
    """Asked last, for what no other finder knows."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Of a renamed module, or None."""
        if not fullname.startswith(f"{__package__}.") or fullname not in renamed_modules():
            return None
        return ModuleSpec(fullname, _RenamedModule())
