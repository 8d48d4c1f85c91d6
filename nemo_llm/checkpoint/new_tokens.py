"""Tokens of a checkpoint whose rows were made when its vocabulary grew, and have not been trained since."""

import json
from pathlib import Path

from nemo_llm.errors import CheckpointDamagedError

NEW_TOKENS = "new_tokens.json"
"""Written by ``tools/extend_vocabulary.py``; checkpoints of training do not have it."""


def new_tokens(folder: Path) -> list[str]:
    """Tokens that the checkpoint ``folder`` was extended by.

    Raises:
        CheckpointDamagedError: the file is not what `NEW_TOKENS` holds.
    """
    path = folder / NEW_TOKENS
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["tokens"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path}: damaged; not readable as a list of tokens ({error})") from None
