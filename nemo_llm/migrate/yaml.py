"""YAML from elsewhere: its aliases and references can make a few lines as large as the memory, or endless."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_llm.errors import InputError

_MOST_VALUES = 100_000
_DEEPEST = 8  # references of references; a product of two of them doubles the work with each


def check_yaml(text: str, where: str) -> None:
    """Refuse YAML that is large or endless once each alias stands for its content, before anything expands it.

    Args:
        where: put before the message.

    Raises:
        InputError: it is that, or no YAML.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES + 1  # as long as it is being counted: it would contain itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = min(1 + sum(map(size, flat)), _MOST_VALUES + 1)
        return sizes[id(node)]

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        count = 0 if root is None else size(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as YAML: {error}") from None
    if count > _MOST_VALUES:
        raise InputError(
            f"{where}: refused; with its aliases (*name) written out it would hold more than {_MOST_VALUES:,} values.\n"
            "      fix: write the few that are needed without aliases"
        )


def read_yaml(text: str, path: Path) -> dict[str, Any]:
    """Nested mappings, with the launcher's arithmetic done and paths that cannot be resolved left as they stand."""
    check_yaml(text, f"input={path}")
    try:
        tree = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"input={path}: not readable as YAML: {error}") from None
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    if not isinstance(plain, dict) or "model" not in plain:
        raise InputError(f"input={path}: no `model` section; expected a training file of NeMo-Framework-Launcher")
    return {str(key): value for key, value in plain.items()}


_ARITHMETIC = re.compile(r"\$\{(multiply|divide_ceil|divide_floor):\s*([^,]+),\s*(.+)\}$")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(value, f"{prefix}{key}.")
        else:
            flat[prefix[:-1]] = node

    walk(tree, "")
    return {key: _resolve(value, key, flat) for key, value in flat.items()}


def _resolve(value: Any, key: str, flat: Mapping[str, Any], depth: int = 0) -> Any:
    """``${multiply:4, ${.hidden_size}}`` and references to other keys of the file; the rest stays as it stands.

    Raises:
        InputError: references that come back to where they began, or lead too far.
    """
    if not isinstance(value, str):
        return value
    if depth > _DEEPEST:
        raise InputError(f"{key}: {value} refers to itself, or to others through more than {_DEEPEST} keys")
    if found := re.fullmatch(r"\$\{([.\w]+)\}", value):
        name = found[1].removeprefix("training.")
        target = f"{key.rpartition('.')[0]}{name}" if name.startswith(".") else name
        return _resolve(flat[target], target, flat, depth + 1) if target in flat else value
    if found := _ARITHMETIC.match(value):
        try:
            first, second = (int(_resolve(part.strip(), key, flat, depth + 1)) for part in found.groups()[1:])
            divided = {"divide_ceil": -(-first // second), "divide_floor": first // second} if second else {}
        except (ValueError, TypeError):
            return value
        return {"multiply": first * second, **divided}.get(found[1], value)
    return value
