"""Tokens of a checkpoint whose rows were made when its vocabulary grew, and have not been trained since."""

import json
from pathlib import Path

NEW_TOKENS = "new_tokens.json"
"""Written by ``tools/extend_vocabulary.py``; checkpoints of training do not have it."""


def new_tokens(folder: Path) -> list[str]:
    """Tokens that the checkpoint ``folder`` was extended by."""
    try:
        return list(json.loads((folder / NEW_TOKENS).read_text(encoding="utf-8"))["tokens"])
    except FileNotFoundError:
        return []
