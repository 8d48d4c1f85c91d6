"""Modules under the names that they had before: an import finds them, with a warning that gives the new name.

Everything is imported inside the functions: each start of a command comes through here, and none of them needs it.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def renamed_modules() -> dict[str, str]:
    """New name by old name, from ``old_names.txt``: two dotted names a line."""
    from pathlib import Path

    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return {f"{__package__}.{old}": f"{__package__}.{new}" for old, new in map(str.split, lines)}


class OldNames:
    """A finder and loader of the import system, asked last, for what no other finder knows."""

    def find_spec(self, fullname: str, *_: object) -> "ModuleSpec | None":
        """Of a renamed module, or None."""
        if not fullname.startswith(f"{__package__}.") or fullname not in renamed_modules():
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # it asks for the methods below, not for the class

    def create_module(self, _spec: "ModuleSpec") -> None:
        """Let the import system make an empty module."""

    def exec_module(self, module: "ModuleType") -> None:
        """Put the module of the new name in the place of the empty one."""
        import importlib
        import warnings

        new = renamed_modules()[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}; please import that", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)
