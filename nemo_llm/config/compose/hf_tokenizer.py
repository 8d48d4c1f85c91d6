"""What the small files of a Hugging Face folder say of the tokens that begin and end a text. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_llm.errors import InputError

GENERATION_CONFIG = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is no such file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not readable as a JSON object ({error})") from None


def special_ids(folder: Path) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad a text: an integer each, or a list of those that end it.

    Of ``generation_config.json`` and ``config.json`` the first that names an id counts, as for transformers.

    Raises:
        InputError: what stands there is no id.
    """
    found: dict[str, Any] = {}
    for name in (GENERATION_CONFIG, "config.json"):
        content = read_json(folder / name)
        for key in SPECIAL_IDS:
            value = content.get(key)
            several = key == "eos_token_id" and isinstance(value, list)
            # By its type, since true and false are integers to Python.
            if value is not None and any(type(one) is not int for one in (value if several else [value])):
                rule = "whole numbers" if key == "eos_token_id" else "a whole number"
                raise InputError(f"{folder / name}: {key}={value!r}: token ids are {rule}")
            if value is not None:
                found.setdefault(key, value)
    return found


def add_special_ids(folder: Path, ids: Mapping[str, Any]) -> None:
    """Write ids into the ``generation_config.json`` of a folder, beside what it has."""
    path = folder / GENERATION_CONFIG
    written = read_json(path)
    if ids and ids != {key: written.get(key) for key in ids}:
        path.write_text(json.dumps({**written, **ids}, indent=2) + "\n", encoding="utf-8")


def as_list(ids: Any) -> list[int]:
    """The ids under ``eos_token_id``, which may be none, one or a list."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def token_in_front(backend: Any) -> str | None:
    """The one token that a tokenizer of the ``tokenizers`` library itself puts before a text; None: none, or several.

    Its post-processor decides. transformers 5 does not read ``add_bos_token`` where there is a tokenizer.json, and that
    a token is named (``bos_token``) does not mean that it is added.
    """
    try:
        with_added = backend.encode("a", add_special_tokens=True)
    except BaseException as error:  # the library raises a bare Exception, or what its Rust code panics with
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"a tokenizer.json that cannot encode a text: {error}") from None
        raise
    own = [number for number, special in enumerate(with_added.special_tokens_mask) if not special]
    ids = with_added.ids[: own[0]] if own else []
    return str(backend.id_to_token(ids[0])) if len(ids) == 1 else None


def bos_token(file: Path) -> str | None:
    """As `token_in_front`, of a ``tokenizer.json``; None also where there is no such file."""
    from tokenizers import Tokenizer

    if not file.is_file():
        return None
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{file}: not a Hugging Face tokenizer.json ({error})") from error
    try:
        return token_in_front(backend)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def token_text(token: Any) -> str | None:
    """A special token of ``tokenizer_config.json``, which is written as text or as a mapping; None for null.

    Raises:
        InputError: it is neither.
    """
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) and token is not None:
        raise InputError(f"tokenizer_config.json: {token!r} is no token: expected a text, or a mapping with content")
    return text
