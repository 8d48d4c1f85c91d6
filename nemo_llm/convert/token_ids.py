"""The tokenizer's part of the gate: the same texts through transformers' tokenizer and ours."""

from pathlib import Path
from typing import Any

from nemo_llm.errors import CheckpointError
from nemo_llm.log import get_logger
from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder

_log = get_logger(__name__)

TEXTS = (
    "The capital of France is",
    " Two  spaces, a tab\tand a line\nbreak.\n\n",
    "def f(x):\n    return x ** 2 + 1  # 3.14159, 1e-5, 2026-11-29",
    "Ein Käse für 12,50 €; un café à Besançon; Привет, мир; 你好,世界; שלום; 🙂👩‍👩‍👧",
    "x",
    "¿Qué?\r\n\u2028 e\u0301 \u00a0 \ufeff",
)


def compare_token_ids(hf_folder: Path, tokenizer_folder: Path, beginning: bool) -> int:
    """Encode each text with both; returns how many texts were compared: none where transformers cannot load its own.

    Args:
        beginning: compare what stands before a text, too. (What transformers may put behind one is left out: a text to
            continue has no end.)

    Raises:
        CheckpointError: ids differ; names the text and both.
    """
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(hf_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its classes raise for files that they do not take
        _log.warning("%s: transformers cannot load the tokenizer, so that ids are not compared (%s)", hf_folder, error)
        return 0
    ours = load_tokenizer_from_folder(tokenizer_folder)
    start = [] if ours.bos_id is None or not beginning else [ours.bos_id]
    for text in TEXTS:
        expected = list(theirs(text, add_special_tokens=beginning).input_ids)
        found = [*start, *ours.encode(text)]
        behind = expected[len(found) :]
        if expected[: len(found)] != found or not set(behind) <= set(theirs.all_special_ids):
            raise CheckpointError(
                f"{hf_folder}: the tokenizers differ on {text!r}: transformers {expected[:24]}, here {found[:24]}.\n"
                "      fix: set verify=false to convert all the same; texts would then be read otherwise than by "
                "transformers"
            )
    return len(TEXTS)
