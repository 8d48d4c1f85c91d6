"""Texts and tokenizers that ship with the package, reached as ``asset:NAME`` in the configuration."""

from pathlib import Path

from nemo_llm.errors import InputError

ASSET_PREFIX = "asset:"
_ROOT = Path(__file__).resolve().parent


def asset_names(kind: str) -> list[str]:
    """Return the names of all shipped assets of a kind (``text`` or ``tokenizers``)."""
    return sorted(path.stem for path in (_ROOT / kind).iterdir() if path.is_dir() or path.suffix == ".jsonl")


def resolve_path(path: str, kind: str) -> Path:
    """Return the file or folder that ``path`` names: ``asset:NAME`` inside the package, anything else as it stands.

    ``kind`` is ``text`` (JSONL files with a ``text`` field) or ``tokenizers`` (folders). Raises InputError for an
    unknown asset.
    """
    if not path.startswith(ASSET_PREFIX):
        return Path(path).expanduser()
    name = path[len(ASSET_PREFIX) :]
    if name not in asset_names(kind):
        raise InputError(f"{path}: no such {kind} asset. Shipped are: {', '.join(asset_names(kind))}")
    return _ROOT / kind / (f"{name}.jsonl" if kind == "text" else name)
