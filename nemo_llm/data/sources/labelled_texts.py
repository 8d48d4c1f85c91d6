"""Texts with a label each, as documents of tokens: what a head for classes or scores is trained on.

A cache entry is one of conversations (`chat_store`) with two files more: ``targets.bin`` (float32, the number of the
class or the score) and ``places.bin`` (float64, by which texts are ordered and split). Behind each text stands one
token that ends a document: what is learned in its place, from the last token of the text, is the label.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nemo_llm.config.sections.data import parse_split
from nemo_llm.config.sections.labelled import LabelledConfig
from nemo_llm.corpus.documents import expand_inputs
from nemo_llm.corpus.records import read_records, text_of
from nemo_llm.data.sources.chats import ChatStore, build_counted, in_words, write_documents
from nemo_llm.errors import InputError
from nemo_llm.storage.build_cache import content_key, file_sha256
from nemo_llm.tokenizers.tokenizer import Tokenizer

_VERSION = 1


def place_of(text: str) -> float:
    """Where a text lies in [0, 1): by its content alone, so that equal texts never fall on both sides of a split."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / (1 << 48)


def is_held_out(text: str, split: str) -> bool:
    """Whether ``data.split`` gives a labelled text to validation."""
    train, validation = parse_split(split)
    return train <= place_of(text) < train + validation


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text as heads read it: the token that begins a text, where the model has one, and the text's own."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]


class LabelledStore(ChatStore):
    """Labelled texts of a cache entry, in the order of their places."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._targets = np.fromfile(folder / "targets.bin", dtype="<f4")
        self._places = np.fromfile(folder / "places.bin", dtype="<f8")

    def target(self, document: int) -> float:
        """Number of the class, or the score, of a text."""
        return float(self._targets[document])

    def first_document(self, share: float) -> int:
        """The first text whose place is at least ``share``."""
        return int(np.searchsorted(self._places, share, side="left"))


@dataclasses.dataclass(frozen=True)
class LabelRules:
    """How a record becomes tokens and a target."""

    text_key: str
    config: LabelledConfig
    classes: Sequence[str]
    """Names of the classes; one name alone means that labels are scores."""
    capacity: int
    virtual_tokens: int

    def encode(self, record: dict, tokenizer: Tokenizer, counts: Counter[str]) -> tuple[list[int], float] | None:
        """Tokens of a text and its target; None where it is left out. ``counts`` what is cut or left out.

        Raises:
            InputError: missing fields, an empty text, an unknown class, or one that is too long where none may be.
        """
        text = record.get(self.text_key)
        if not isinstance(text, str):
            raise InputError(f"no text in the field {self.text_key!r}; it has {', '.join(record)} (data.text_key)")
        target = self._target(record)
        ids = text_ids(text, tokenizer)
        if not ids:
            raise InputError(f"the text in {self.text_key!r} is empty: there is no token to tell a label from")
        counts["texts"] += 1
        room = self.capacity - self.virtual_tokens
        if len(ids) > room:
            if self.config.too_long == "error":
                raise InputError(
                    f"{len(ids)} tokens, and a sample has room for {room}; raise data.seq_length, or set "
                    "data.labelled.too_long=truncate or drop"
                )
            counts["truncated" if self.config.too_long == "truncate" else "dropped as too long"] += 1
            if self.config.too_long == "drop":
                return None
        return [*(-1 - number for number in range(self.virtual_tokens)), *ids[:room]], target

    def _target(self, record: dict) -> float:
        key = self.config.label_key
        if key not in record:
            raise InputError(f"no field {key!r}; it has {', '.join(record)} (data.labelled.label_key)")
        label = record[key]
        if len(self.classes) == 1:
            if isinstance(label, bool) or not isinstance(label, int | float):
                raise InputError(f"the field {key!r} of a score must be a number, received {label!r}")
            return float(label)
        name = text_of(record, key)
        if name not in self.classes:
            raise InputError(
                f"the label {name!r} is none of model.head = [{', '.join(self.classes)}]; add it there, or correct it"
            )
        return float(list(self.classes).index(name))


def open_labelled(pattern: str, tokenizer: Tokenizer, cache: Path, rules: LabelRules) -> LabelledStore:
    """The texts of a file, folder or glob, encoded into the cache the first time.

    Raises:
        InputError: missing files; the first record that is no labelled text, with file and line; nothing left.
    """
    files = expand_inputs(pattern)
    key = content_key(
        kind="labelled",
        version=_VERSION,
        files=[file_sha256(file) for file in files],
        rules=dataclasses.asdict(rules),
        tokenizer=tokenizer.fingerprint,
    )

    def build(folder: Path) -> dict:
        counts: Counter[str] = Counter()
        found = sorted(_encode_files(files, rules, tokenizer, counts), key=lambda text: text[0])
        if not found:
            raise InputError(f"{pattern}: no text is left to learn from: {in_words(counts, 'texts')}")
        write_documents(folder, (([*ids, tokenizer.eod_id], [0] * len(ids) + [1]) for _, ids, _ in found))
        np.asarray([target for _, _, target in found], dtype="<f4").tofile(folder / "targets.bin")
        np.asarray([place for place, _, _ in found], dtype="<f8").tofile(folder / "places.bin")
        return {"counts": dict(counts)}

    folder = cache / f"labelled-{key}"
    build_counted(folder, build, pattern, "texts")
    return LabelledStore(folder)


def _encode_files(
    files: Iterable[Path], rules: LabelRules, tokenizer: Tokenizer, counts: Counter[str]
) -> Iterator[tuple[float, list[int], float]]:
    """(place, tokens, target) of each text."""
    for file in files:
        for number, record in read_records(file):
            try:
                encoded = rules.encode(record, tokenizer, counts)
            except InputError as error:
                raise InputError(f"{file}:{number}: {error}") from error
            if encoded is not None:
                yield place_of(record[rules.text_key]), *encoded
