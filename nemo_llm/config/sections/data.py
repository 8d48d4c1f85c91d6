"""The ``data`` section: tokenizer, blends, validation sets and how documents become samples.

Defaults live in ``conf/data/*.yaml``; here are the types and the checks that one section can make on its own.
"""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.chat import ChatConfig
from nemo_llm.config.sections.fields import (
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PathStr,
    PositiveFloat,
    PositiveInt,
    Scalar,
    Section,
)
from nemo_llm.config.sections.labelled import LabelledConfig

TokenizerType = Literal["huggingface", "gpt2_bpe", "sentencepiece", "tiktoken", "byte", "nemo"]

_SPECIAL = ("mask_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "unk_token")
NEMO_PATHS = ("pretrained_model_name", "vocab_file", "merges_file", "model_path")
"""Arguments of NeMo's tokenizers that name a file or a folder."""
NEMO_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "AutoTokenizer": (*NEMO_PATHS[:3], *_SPECIAL, "use_fast", "include_special_tokens"),
    "ByteLevelTokenizer": ("vocab_size", "_eos_id", "_pad_id", "_bos_id"),
    "CharTokenizer": ("vocab_file", *_SPECIAL),
    "SentencePieceTokenizer": (
        "model_path",
        "legacy",
        "ignore_extra_whitespaces",
        "trim_spm_separator_after_special_token",
        "spm_separator",
    ),
    "WordTokenizer": ("vocab_file", *_SPECIAL),
}
"""Classes that may be named, with their arguments: a saved tokenizer names them too, and it may come from anywhere.

``trust_remote_code`` is none of them: NeMo would run Python files that lie beside the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig(Section):
    """Which tokenizer turns text into ids; it is saved with every checkpoint."""

    name: NonEmptyStr
    """A label for logs and file names."""
    type: TokenizerType
    """``huggingface`` (tokenizer.json), ``gpt2_bpe`` (encoder.json and vocab.bpe), ``sentencepiece`` (.model),
    ``tiktoken`` (ranks), ``byte`` (UTF-8 bytes, no files) or ``nemo`` (a class of NeMo's own)."""
    path: PathStr | None
    """File or folder, or ``asset:NAME`` for one shipped with the package; null for ``byte``."""
    eod_token: str | None
    """The token put after each document; null looks for a known name (``<|endoftext|>``, ``</s>``, ...)."""
    bos_token: str | None
    """The token that begins a text, where the model wants one; null for none."""
    parse_special_tokens: bool
    """true turns the names of special tokens found in raw text into those tokens; false treats them as plain text."""
    tiktoken_pattern: str | None
    """``tiktoken`` only: how text is pre-split: ``r50k_base``, ``cl100k_base``, ``o200k_base`` or a regular
    expression."""
    nemo_class: str | None
    """``nemo`` only: one of `NEMO_TOKENIZERS`, such as ``SentencePieceTokenizer``."""
    nemo_args: dict[str, Scalar]
    """``nemo`` only: the arguments of that class, as `NEMO_TOKENIZERS` lists them."""

    def __post_init__(self) -> None:
        if self.type not in ("byte", "nemo") and self.path is None:
            raise ValueError(f"path is null, but type {self.type} needs a file, a folder or asset:NAME")
        if self.type == "nemo" and self.nemo_class is None:
            raise ValueError("nemo_class is null, but type nemo needs the name of a NeMo tokenizer class")
        if self.type == "nemo" and self.nemo_class not in NEMO_TOKENIZERS:
            known = ", ".join(NEMO_TOKENIZERS)
            raise ValueError(f"nemo_class = {self.nemo_class!r} is not known here; known are {known}")
        unknown = self.nemo_args.keys() - set(NEMO_TOKENIZERS.get(self.nemo_class or "", ()))
        if self.type == "nemo" and unknown:
            known = ", ".join(NEMO_TOKENIZERS[str(self.nemo_class)])
            raise ValueError(f"nemo_args.{min(unknown)} is no argument of {self.nemo_class} here; it has {known}")
        if self.type == "tiktoken" and self.tiktoken_pattern is None:
            raise ValueError(
                "tiktoken_pattern is null, but a file of tiktoken ranks does not say how text is split; "
                "give r50k_base, cl100k_base, o200k_base or a regular expression"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MockConfig(Section):
    """A source of random documents, for benchmarks and layout tests; the same for every machine."""

    num_documents: PositiveInt
    """Number of documents in one epoch."""
    mean_document_length: int
    """Mean length in tokens; lengths follow an exponential law."""

    def __post_init__(self) -> None:
        if self.mean_document_length < 2:  # one token and the end of the document
            raise ValueError(f"mean_document_length must be at least 2, received {self.mean_document_length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendSource(Section):
    """One source of a blend: exactly one of ``prefix``, ``text``, ``chat``, ``labelled`` and ``mock``."""

    name: NonEmptyStr
    """The source's name in logs; it seeds the order, so that moved files keep theirs."""
    weight: NonNegativeFloat | None = None
    """Share of this source, relative to the other weights (``data.blend_by`` says of what); null for all: by size."""
    prefix: PathStr | None = None
    """Path of an indexed dataset without ``.bin``/``.idx``."""
    text: PathStr | None = None
    """Raw text instead: a file, a glob, or ``asset:NAME``; tokenised once into the cache."""
    chat: PathStr | None = None
    """Conversations instead: JSON lines or Parquet, a file or a glob; ``data.chat`` says how they are read."""
    labelled: PathStr | None = None
    """Texts with labels instead, for ``task=classification`` and ``score``: JSON lines or Parquet, a file or a glob."""
    mock: MockConfig | None = None
    """Random documents instead of a file."""

    def __post_init__(self) -> None:
        given = [key for key in ("prefix", "text", "chat", "labelled", "mock") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"blend source {self.name!r}: give exactly one of prefix, text, chat, labelled and mock, "
                f"received {given or 'none'}"
            )
        if self.weight == float("inf"):
            raise ValueError(f"blend source {self.name!r}: weight must be finite")

    @property
    def kind(self) -> str:
        """What the source holds: ``indexed``, ``text``, ``chat``, ``labelled`` or ``mock``."""
        given = (key for key in ("text", "chat", "labelled", "mock") if getattr(self, key) is not None)
        return next(given, "indexed")


Blend = tuple[BlendSource, ...] | tuple[float | PathStr, ...]
"""A list of entries, or Megatron's flat list ``[weight, prefix, weight, prefix]`` or ``[prefix, prefix]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendChange(Section):
    """Other weights from some sample of the run on. Each source goes on from where it stands."""

    from_sample: PositiveInt
    """The first sample (counted from 0 over the whole run) that is drawn by these weights."""
    weights: dict[str, NonNegativeFloat]
    """A weight for each source by name; one that is left out gives no sample from there on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FimConfig(Section):
    """Fill-in-the-middle (arXiv:2207.14255)."""

    rate: Fraction
    """Share of documents that are rearranged."""
    spm_rate: Fraction
    """Share of those written suffix first."""
    prefix_token: NonEmptyStr
    """Sentinel before the prefix, as the tokenizer names it."""
    middle_token: NonEmptyStr
    """Sentinel before the middle."""
    suffix_token: NonEmptyStr
    """Sentinel before the suffix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeqLengthRamp(Section):
    """Short contexts first: samples keep their shape, but fall into stretches that do not see each other."""

    start_seq_length: PositiveInt
    """Length of the stretches at the start; it doubles in equal shares of ``ramp_samples`` up to ``seq_length``."""
    ramp_samples: PositiveInt
    """Samples after which the context is ``seq_length``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """Where tokens come from and how samples are cut from them."""

    name: NonEmptyStr
    """A label for logs."""
    tokenizer: TokenizerConfig
    """Turns text into ids, at preparation and at generation."""
    blend: Blend
    """The sources of training samples."""
    validation: dict[str, Blend]
    """Named validation sets, each a blend of its own; evaluated in a fixed order."""
    split: str | None
    """Megatron's split, such as ``99,1``: the documents of each source, in file order, cut into contiguous training
    and validation parts; the latter become the validation set ``split``. Text of so few documents that a part would
    hold less than a sample is cut by tokens. Labelled texts are split by a hash of their content instead. null: all is
    for training."""
    seq_length: PositiveInt
    """Tokens a sample."""
    blend_by: Literal["samples", "tokens", "temperature"]
    """What a weight is a share of: ``samples``; ``tokens`` (the same unless samples are padded); or ``temperature``
    (no weights: the share of a source is its size to the power 1 / ``blend_temperature``, normalised)."""
    blend_temperature: PositiveFloat
    """For ``blend_by: temperature``; 1 is by size, larger is flatter."""
    blend_changes: tuple[BlendChange, ...]
    """Changes of the weights in the course of the run, by rising ``from_sample``; also how a source is left out from
    some point on."""
    packing: Literal["concatenate", "best_fit", "none"]
    """``concatenate``: documents run on from sample to sample; ``best_fit``: a sample holds whole documents and
    padding, and only one longer than a sample is cut (arXiv:2404.10830); ``none``: each document has a sample to
    itself. Conversations never run on: for them ``concatenate`` is ``best_fit``."""
    chat: ChatConfig
    """How conversations become tokens."""
    labelled: LabelledConfig | None = None
    """How labelled texts become tokens."""
    fim: FimConfig | None
    """Fill-in-the-middle; null for none."""
    seq_length_ramp: SeqLengthRamp | None
    """A ramp of the context length; null for none."""
    reset_position_ids: bool
    """Start positions from 0 at every document inside a sample."""
    reset_attention_mask: bool
    """Keep attention within a document (samples then carry ``document_ids``)."""
    eod_mask_loss: bool
    """Leave out the loss where the input is the end-of-document token."""
    text_key: str
    """The field of JSON lines that holds the text."""
    cache_dir: PathStr | None
    """Folder of tokenised text and of checks already made; null: ``$NEMO_LLM_CACHE``, else ``~/.cache/nemo_llm``."""
    prefetch: NonNegativeInt
    """Micro-batches prepared ahead in the background; 0 turns the background thread off."""

    def __post_init__(self) -> None:
        if self.split is not None:
            parse_split(self.split)
        if "split" in self.validation and self.split is not None:
            raise ValueError("validation: the name 'split' belongs to the set that data.split makes; rename it")
        starts = [change.from_sample for change in self.blend_changes]
        if starts != sorted(set(starts)):
            raise ValueError(f"blend_changes: from_sample must rise, received {starts}")
        if self.blend_changes and self.blend_by == "temperature":
            raise ValueError(
                "blend_changes: give weights from the start (blend_by: samples or tokens), not temperature"
            )
        ramp = self.seq_length_ramp
        if ramp is not None and self.seq_length % ramp.start_seq_length:
            raise ValueError(
                f"seq_length_ramp.start_seq_length {ramp.start_seq_length} must divide seq_length {self.seq_length}"
            )
        for key, blend in {"data.blend": self.blend, **self.validation}.items():
            entries = blend_entries(blend, key)
            chats = [entry.name for entry in entries if entry.chat is not None or entry.labelled is not None]
            if chats and self.packing != "none" and not self.reset_attention_mask:
                raise ValueError(
                    f"{key}: conversations or labelled texts of {chats[0]!r} would see each other inside a sample; set "
                    "data.reset_attention_mask=true and data.reset_position_ids=true, or data.packing=none"
                )
            if chats and self.fim is not None:
                raise ValueError(
                    f"{key}: fill-in-the-middle would tear the documents of {chats[0]!r}; set data.fim=null"
                )


def parse_split(split: str) -> tuple[float, float]:
    """Return the training and validation shares of a split string such as ``99,1`` (they sum to 1).

    Megatron's third (test) share is allowed and left unused. Raises ValueError.
    """
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError as error:
        raise ValueError(f"split {split!r} must be numbers and commas, such as '99,1'") from error
    if not 2 <= len(parts) <= 3 or min(parts) < 0 or parts[0] == 0 or not 0 < sum(parts) < float("inf"):
        raise ValueError(f"split {split!r} needs two or three shares, the first above 0, such as '99,1'")
    return parts[0] / sum(parts), parts[1] / sum(parts)


def blend_entries(blend: Blend, key: str) -> tuple[BlendSource, ...]:
    """Return a blend as entries, reading Megatron's flat list too; ``key`` names it in errors (ValueError)."""
    if not blend:
        raise ValueError(f"{key}: empty; name at least one source")
    if all(isinstance(item, BlendSource) for item in blend):
        entries = tuple(item for item in blend if isinstance(item, BlendSource))
    else:
        entries = _flat_entries(list(blend), key)
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{key}: source names must differ, received {', '.join(twice)} more than once")
    weights = [entry.weight for entry in entries]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise ValueError(
            f"{key}: give every source a weight or none, received {dict(zip(names, weights, strict=True))}"
        )
    if all(weight == 0 for weight in weights):
        raise ValueError(f"{key}: every weight is 0; at least one source needs a positive weight")
    return entries


def _flat_entries(items: list[object], key: str) -> tuple[BlendSource, ...]:
    """Read ``[weight, prefix, ...]`` or ``[prefix, ...]``.

    The name seeds a source's order, so it is the prefix's last part where those differ: data may move elsewhere.
    """

    def is_number(item: object) -> bool:
        try:
            float(item)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
        return True

    if not any(is_number(item) for item in items):
        names = _short_names([str(item) for item in items])
        return tuple(BlendSource(name=name, prefix=str(p)) for name, p in zip(names, items, strict=True))
    pairs = list(zip(items[::2], items[1::2], strict=False))
    if len(items) % 2 or any(not is_number(weight) or is_number(prefix) for weight, prefix in pairs):
        raise ValueError(f"{key}: a flat blend alternates weight and prefix, received {items}")
    names = _short_names([str(prefix) for _, prefix in pairs])
    return tuple(
        BlendSource(name=name, weight=float(weight), prefix=str(prefix))  # type: ignore[arg-type]
        for name, (weight, prefix) in zip(names, pairs, strict=True)
    )


def _short_names(prefixes: list[str]) -> list[str]:
    last_parts = [prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in prefixes]
    return last_parts if len(set(last_parts)) == len(prefixes) else prefixes
