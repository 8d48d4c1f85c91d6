"""Training tokenizers on a sample of the corpus, and measuring how well they fit each source."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_llm.config.commands.data import TrainTokenizerConfig
from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.corpus.documents import Document
from nemo_llm.corpus.shards import TextFormat, cut_inputs, read_shard
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import TIKTOKEN_PATTERNS, Tokenizer, load_tokenizer, load_tokenizer_from_folder

_MAX_SHARDS = 64  # places over a source that the sample is taken from
_HELD_OUT_EVERY = 20
_MAX_LINE = 2000  # SentencePiece trains on lines and drops long ones


_BYTES = TokenizerConfig(
    name="byte",
    type="byte",
    path=None,
    eod_token=None,
    bos_token=None,
    parse_special_tokens=False,
    tiktoken_pattern=None,
    nemo_class=None,
    nemo_args={},
)


@dataclass(frozen=True, slots=True)
class TextSample:
    """Text of one source: documents to train on, and others to measure on."""

    train: list[str]
    held_out: list[str]


def take_samples(config: TrainTokenizerConfig) -> dict[str, TextSample]:
    """Return a sample of each source; raises InputError for a source without text."""
    samples = {}
    for name, place in config.input.items():
        texts = list(_spread_texts(place, config))
        held_out = texts[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] or texts[:1]
        train = [text for number, text in enumerate(texts, start=1) if number % _HELD_OUT_EVERY] or texts
        if not texts:
            raise InputError(f"source {name}: {place} holds no text")
        samples[name] = TextSample(train, held_out)
    return samples


def train_tokenizer(config: TrainTokenizerConfig, samples: Mapping[str, TextSample]) -> Tokenizer:
    """Train on the samples, save to ``config.output`` and return the tokenizer as it loads from there."""
    folder = Path(config.output).expanduser()
    if (folder / "report.json").exists():
        raise InputError(f"{folder}: holds a tokenizer already; choose another output")
    texts = (text for sample in samples.values() for text in sample.train)
    with tempfile.TemporaryDirectory() as temporary:
        if config.type == "byte":
            keys: dict[str, Any] = {"type": "byte", "path": None}
        elif config.library == "sentencepiece":
            keys = {"type": "sentencepiece", "path": f"{temporary}/tokenizer.model"}
            _train_sentencepiece(config, texts, Path(temporary) / "tokenizer")
        else:
            keys = {"type": "huggingface", "path": f"{temporary}/tokenizer.json"}
            _train_huggingface(config, texts).save(keys["path"])
        eod_token = None if config.type == "byte" else config.eod_token
        load_tokenizer(dataclasses.replace(_BYTES, name=folder.name, eod_token=eod_token, **keys)).save(folder)
    return load_tokenizer_from_folder(folder)


def report(tokenizer: Tokenizer, samples: Mapping[str, TextSample]) -> dict[str, Any]:
    """Return figures by source on held-out text, and write nothing.

    ``tokens_per_word`` is the fertility (words are runs between white space), ``bytes_per_token`` the compression,
    ``round_trip`` the share of documents that decode to themselves, ``used`` the share of the vocabulary that the whole
    sample uses, ``single_byte`` the share of tokens that are one byte of a character that takes several: what the
    vocabulary does not cover.
    """
    sources = {}
    used: set[int] = set()
    for name, sample in samples.items():
        encoded = tokenizer.encode_batch(sample.held_out)
        words = sum(len(re.findall(r"\S+", text)) for text in sample.held_out)
        tokens = sum(map(len, encoded))
        decoded = [tokenizer.decode(ids) for ids in encoded]
        used.update(number for ids in encoded for number in ids)
        used.update(number for ids in tokenizer.encode_batch(sample.train) for number in ids)
        partial = {number for ids in encoded for number in set(ids) if "\ufffd" in tokenizer.decode([number])}
        sources[name] = {
            "documents": len(sample.held_out),
            "characters": sum(map(len, sample.held_out)),
            "tokens": tokens,
            "tokens_per_word": tokens / max(1, words),
            "bytes_per_token": sum(len(text.encode()) for text in sample.held_out) / max(1, tokens),
            "single_byte": sum(number in partial for ids in encoded for number in ids) / max(1, tokens),
            "round_trip": sum(a == b for a, b in zip(decoded, sample.held_out, strict=True)) / len(sample.held_out),
        }
    return {"vocab_size": tokenizer.vocab_size, "used": len(used) / tokenizer.vocab_size, "sources": sources}


def write_report(folder: Path, figures: dict[str, Any]) -> None:
    """Write ``report.json`` beside the tokenizer."""
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _spread_texts(path: str, config: TrainTokenizerConfig) -> Iterator[str]:
    """Yield documents from places spread evenly over a source, up to its share of characters in all."""
    text_format = TextFormat(config.text_key, config.plain_text, config.encoding)
    shards = cut_inputs([path], text_format).shards
    by_line = dataclasses.replace(text_format, plain_text="line")  # a share of a long file, without reading it whole
    step = -(-len(shards) // _MAX_SHARDS)
    chosen = shards[::step]
    left = config.sample_characters
    for number, shard in enumerate(chosen):
        share = -(-left // (len(chosen) - number))
        for item in read_shard(shard, by_line):
            if share <= 0:
                break
            if isinstance(item, Document):
                yield item.text[:share]
                left -= len(item.text[:share])
                share -= len(item.text[:share])


def _train_huggingface(config: TrainTokenizerConfig, texts: Iterator[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "special_tokens": [config.eod_token, *config.special_tokens],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    trainer: Any
    if config.type == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**options)
    else:
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TIKTOKEN_PATTERNS.get(config.pattern, config.pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_sentencepiece(config: TrainTokenizerConfig, texts: Iterator[str], prefix: Path) -> None:
    import sentencepiece

    lines = (line[start : start + _MAX_LINE] for text in texts for line in text.splitlines()
             for start in range(0, len(line), _MAX_LINE))  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(prefix),
            model_type=config.type,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _MAX_LINE,
            user_defined_symbols=["\n", "\t"],
            control_symbols=[config.eod_token, *config.special_tokens],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"vocab_size = {config.vocab_size}: SentencePiece cannot train on this sample ({error}); use a smaller "
            "one, or more text"
        ) from error
