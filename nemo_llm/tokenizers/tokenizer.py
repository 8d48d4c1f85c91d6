"""Tokenizers behind one small interface: Hugging Face, GPT-2 BPE files, SentencePiece, tiktoken ranks, bytes, NeMo's.

Each is loaded from local files named in ``data.tokenizer``; ``fingerprint`` is a hash of those files and of every
setting that changes ids, so that data and checkpoints made with different tokenizers never mix unnoticed.
"""

import abc
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_llm.assets import resolve_path
from nemo_llm.checkpoint.saved_run import TOKENIZER_FILE_NAME, read_tokenizer
from nemo_llm.config.compose.hf_tokenizer import add_special_ids, as_list, special_ids, token_in_front
from nemo_llm.config.sections.data import NEMO_PATHS, TokenizerConfig
from nemo_llm.errors import ConfigError, InputError, Problem

# Files beside a tokenizer's own that change no ids and that an export, a chat or a generation wants: kept with it.
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"),
    "additional_chat_templates/*.jinja",
)
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<eod>", "[SEP]")

# How GPT-2 and OpenAI's later models split text before merging (github.com/openai/tiktoken, tiktoken_ext, MIT).
TIKTOKEN_PATTERNS = {
    "r50k_base": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k_base": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    config: TokenizerConfig
    """What it was made from."""
    folder: Path | None
    """Where its files lie, and what came with them, such as a chat template; None where it has none."""
    vocab_size: int
    """Number of ids; every id is below it."""
    eod_id: int
    """The id put after each document."""
    bos_id: int | None
    """The id that begins a text, if the model has one."""
    fingerprint: str
    """SHA-256 of the files and of the settings that change ids."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return what ends a model's text: the ids that the files beside it name, else the end of a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any token added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, the same as ``encode`` of each."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, None when there is none."""
        ...

    def vocabulary(self) -> Iterable[str]:
        """Return the names of the ordinary tokens, as far as they have any."""
        ...

    def control_tokens(self) -> Mapping[str, int]:
        """Return names and ids of the tokens that stand for no text, such as the end of a document."""
        ...

    def save(self, folder: Path) -> None:
        """Write all files to a folder that ``load_tokenizer_from_folder`` reads."""
        ...


class _FileTokenizer(abc.ABC):
    """What all kinds share: their files, fingerprint and saving. Subclasses set ids and sizes."""

    vocab_size: int
    eod_id: int
    bos_id: int | None

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.eod_id,)

    def __init__(self, config: TokenizerConfig, files: list[Path]) -> None:
        self.config = config
        self.files = files
        self.folder = files[0].parent if files else None
        self.fingerprint = _fingerprint(config, files)
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """As `Tokenizer.decode`."""

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def vocabulary(self) -> Iterable[str]:
        return self._ids

    def control_tokens(self) -> Mapping[str, int]:
        return {}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        saved = dataclasses.asdict(self.config)
        # A single file is named; of several, the folder is. Both are relative, so that the folder can be moved.
        saved["path"] = None if not self.files else self.files[0].name if len(self.files) == 1 else "."
        (folder / TOKENIZER_FILE_NAME).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
        if self.folder is not None:
            copy_companions(self.folder, folder)
        if self.config.type == "huggingface":  # what config.json alone names would be lost with it
            add_special_ids(folder, special_ids(self.files[0].parent))

    def _special_id(self, name: str | None, names: tuple[str, ...], ids: dict[str, int], key: str) -> int | None:
        """Return the id of the named token, or of the first known name when none is given."""
        if name is not None:
            if name not in ids:
                raise _problem(key, name, f"is not in the vocabulary of {self.config.path}", "name a token that is")
            return ids[name]
        return next((ids[known] for known in names if known in ids), None)

    def _set_special_ids(self, ids: dict[str, int]) -> None:
        self._ids = ids
        eod = self._special_id(self.config.eod_token, _EOD_NAMES, ids, "eod_token")
        if eod is None:
            missing = f"{self.config.path} has none of {', '.join(_EOD_NAMES)}"
            raise _problem("eod_token", None, missing, "name the token that ends a document")
        self.eod_id = eod
        self.bos_id = self._special_id(self.config.bos_token, (), ids, "bos_token")


class HuggingFaceTokenizer(_FileTokenizer):
    """A ``tokenizer.json`` through the ``tokenizers`` library, or GPT-2's two files as the same kind of tokenizer."""

    def __init__(self, config: TokenizerConfig) -> None:
        from tokenizers import Tokenizer as Backend

        path = resolve_path(_required_path(config), "tokenizers")
        if config.type == "gpt2_bpe":
            super().__init__(config, [_existing(path / "encoder.json"), _existing(path / "vocab.bpe")])
            self.backend = _gpt2_backend(*self.files)
        else:
            super().__init__(config, [_existing(path / "tokenizer.json" if path.is_dir() else path)])
            try:
                self.backend = Backend.from_file(str(self.files[0]))
            except Exception as error:  # the library raises a bare Exception
                raise InputError(f"{self.files[0]}: not a Hugging Face tokenizer.json ({error})") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not config.parse_special_tokens
        ids = self.backend.get_vocab(with_added_tokens=True)
        if not ids:
            raise InputError(f"{self.files[0]}: has no tokens")
        self.vocab_size = max(ids.values()) + 1
        self._set_special_ids(ids)

    @property
    def end_ids(self) -> tuple[int, ...]:
        named = special_ids(self.files[0].parent) if self.config.type == "huggingface" else {}
        return tuple(as_list(named.get("eos_token_id"))) or (self.eod_id,)

    def unsaved_bos(self) -> str | None:
        """The token that the files put before a text, where the saved configuration says none."""
        return token_in_front(self.backend) if self.bos_id is None else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def control_tokens(self) -> Mapping[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece ``.model`` file."""

    def __init__(self, config: TokenizerConfig) -> None:
        import sentencepiece

        super().__init__(config, [_existing(resolve_path(_required_path(config), "tokenizers"))])
        try:
            self.backend = sentencepiece.SentencePieceProcessor(model_file=str(self.files[0]))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{self.files[0]}: not a SentencePiece model ({error})") from error
        if config.parse_special_tokens:
            raise _problem("parse_special_tokens", True, "SentencePiece never parses control tokens", "set false")
        self.vocab_size = self.backend.vocab_size()
        self._set_special_ids({self.backend.id_to_piece(number): number for number in range(self.vocab_size)})

    def control_tokens(self) -> Mapping[str, int]:
        return {name: number for name, number in self._ids.items() if self.backend.is_control(number)}

    def encode(self, text: str) -> list[int]:
        return self.backend.encode_as_ids(text)  # a list of texts would start threads at every call

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids))


class TiktokenTokenizer(_FileTokenizer):
    """A file of tiktoken ranks (base64 token and rank a line); the end-of-document token lies above the last rank."""

    def __init__(self, config: TokenizerConfig) -> None:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        super().__init__(config, [_existing(resolve_path(_required_path(config), "tokenizers"))])
        try:
            ranks = load_tiktoken_bpe(str(self.files[0]))
        except ValueError as error:
            raise InputError(f"{self.files[0]}: not a file of tiktoken ranks ({error})") from error
        pattern = config.tiktoken_pattern or ""
        eod = config.eod_token or "<|endoftext|>"
        # OpenAI puts <|endoftext|> right after r50k's last rank, but leaves one id free in cl100k and o200k.
        self.eod_id = max(ranks.values()) + (2 if pattern in ("cl100k_base", "o200k_base") else 1)
        self.bos_id = None
        if config.bos_token is not None and config.bos_token != eod:
            raise _problem("bos_token", config.bos_token, f"a file of ranks knows only {eod!r}", "set null")
        self.backend = tiktoken.Encoding(
            name=config.name,
            pat_str=TIKTOKEN_PATTERNS.get(pattern, pattern),
            mergeable_ranks=ranks,
            special_tokens={eod: self.eod_id},
        )
        self.vocab_size = self.eod_id + 1
        self._ids = {eod: self.eod_id}
        self._ranks = ranks

    def vocabulary(self) -> Iterable[str]:
        return (token.decode("latin-1") for token in self._ranks)

    def control_tokens(self) -> Mapping[str, int]:
        return self._ids

    def encode(self, text: str) -> list[int]:
        if self.config.parse_special_tokens:
            return self.backend.encode(text, allowed_special="all")
        return self.backend.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), errors="replace")


class ByteTokenizer(_FileTokenizer):
    """UTF-8 bytes as ids 0 to 255; the end of a document is 256."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config, [])
        self.vocab_size, self.eod_id, self.bos_id = 257, 256, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(number for number in ids if number < 256).decode("utf-8", errors="replace")


class NemoTokenizer(_FileTokenizer):
    """One of NeMo's own tokenizers (imports NeMo, which takes 15 s: only on demand)."""

    def __init__(self, config: TokenizerConfig) -> None:
        from nemo.collections.common import tokenizers

        arguments = dict(config.nemo_args)
        files = []
        for key in NEMO_PATHS:
            if arguments.get(key) is not None:
                path = resolve_path(str(arguments[key]), "tokenizers")
                if not path.exists():
                    rule = "there is no such file or folder on this machine"
                    raise _problem(f"nemo_args.{key}", arguments[key], rule, "name one; NeMo downloads nothing here")
                arguments[key] = str(path)
                files += _files_below(path)
        super().__init__(config, files)
        if config.nemo_class == "AutoTokenizer":
            arguments["trust_remote_code"] = False
        # One of NEMO_TOKENIZERS, as the configuration's own check has seen.
        try:
            self.backend: Any = getattr(tokenizers, str(config.nemo_class))(**arguments)
        except Exception as error:  # of its many libraries
            raise InputError(f"NeMo's {config.nemo_class} cannot be made of {arguments}: {error}") from error
        self.vocab_size = int(self.backend.vocab_size)
        self.eod_id = int(self.backend.eod) if hasattr(self.backend, "eod") else int(self.backend.eos_id)
        self.bos_id = None if config.bos_token is None else int(self.backend.token_to_id(config.bos_token))

    def encode(self, text: str) -> list[int]:
        return list(self.backend.text_to_ids(text))

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.ids_to_text(list(ids))

    def token_id(self, token: str) -> int | None:
        number = self.backend.token_to_id(token)
        return None if number is None else int(number)

    def save(self, folder: Path) -> None:
        super().save(folder)
        saved = json.loads((folder / TOKENIZER_FILE_NAME).read_text(encoding="utf-8"))
        for key in NEMO_PATHS:
            value = self.config.nemo_args.get(key)
            if value is not None:
                path = resolve_path(str(value), "tokenizers")
                saved["nemo_args"][key] = "." if path.is_dir() else path.name
        saved["path"] = None
        (folder / TOKENIZER_FILE_NAME).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


_KINDS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "huggingface": HuggingFaceTokenizer,
    "gpt2_bpe": HuggingFaceTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "tiktoken": TiktokenTokenizer,
    "byte": ByteTokenizer,
    "nemo": NemoTokenizer,
}


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that the configuration names.

    Raises ConfigError for settings that do not fit and InputError for missing or damaged files.
    """
    return _KINDS[config.type](config)


def load_tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Return a tokenizer written by ``Tokenizer.save``, as checkpoints hold it (InputError when there is none)."""
    tokenizer = load_tokenizer(read_tokenizer(folder))
    tokenizer.folder = folder
    return tokenizer


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside a tokenizer's own files: settings, special tokens, chat templates."""
    for path in (path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _problem(key: str, value: object, rule: str, fix: str) -> ConfigError:
    return ConfigError([Problem(f"data.tokenizer.{key}", value, rule, fix)])


def _required_path(config: TokenizerConfig) -> str:
    if config.path is None:
        raise _problem("path", None, f"type {config.type} needs a path", "name a file, a folder or asset:NAME")
    return config.path


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file")
    return path


def _files_below(path: Path) -> list[Path]:
    return (
        [path]
        if path.is_file()
        else sorted(file for file in path.iterdir() if file.is_file() and file.name != TOKENIZER_FILE_NAME)
    )


def _fingerprint(config: TokenizerConfig, files: list[Path]) -> str:
    """Hash the contents (not the places) of the files and the settings that change ids."""
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key in ("type", "eod_token", "bos_token", "parse_special_tokens", "tiktoken_pattern", "nemo_class")
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _gpt2_backend(encoder: Path, merges: Path) -> Any:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        model = models.BPE.from_file(str(encoder), str(merges))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{encoder.parent}: encoder.json and vocab.bpe are not GPT-2 BPE files ({error})") from error
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # As transformers does: encoder.json has the token already, so that this keeps its id and only marks it special.
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return backend
