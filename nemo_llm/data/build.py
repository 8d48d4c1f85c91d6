"""From the ``data`` section of the configuration to training and validation sources.

``trainer.check_only=true`` shows what `describe_data` says: sources are opened as a run opens them where that is quick.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_llm.config.sections.data import DataConfig
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.sources import SourceSection
from nemo_llm.data.sampling.blend_order import Blend
from nemo_llm.data.sampling.blended_source import BlendedSource, Phase
from nemo_llm.data.sampling.keyed_permutation import derive_key
from nemo_llm.data.sampling.packed_documents import PackedDataset, build_packs
from nemo_llm.data.sampling.token_windows import EndlessSource, TokenWindowDataset, VirtualTokenSource
from nemo_llm.data.sampling.window_to_sample import SampleRules
from nemo_llm.data.sources.kind import OpenContext
from nemo_llm.data.sources.registry import source_kind
from nemo_llm.data.sources.split import SourcePart, split_parts
from nemo_llm.data.sources.token_store import TokenStore
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.storage.build_cache import cache_folder
from nemo_llm.tokenizers.tokenizer import Tokenizer

_VALIDATION_SEED = 0  # validation always reads in the same order, so that runs of different seeds can be compared


@dataclass(frozen=True, slots=True)
class DataSets:
    """What a run trains and validates on."""

    train: BlendedSource
    """Endless."""
    validation: dict[str, BlendedSource]
    """Finite, by name; may be empty."""
    chat_template: str | None = None
    """The template that conversations were written with, as a checkpoint keeps it; None where there are none."""

    def describe(self, num_train_samples: int) -> str:
        """Return a table of every source, with the samples and epochs that a run of this length takes."""
        parts = [f"training, {num_train_samples:,} samples of {self.train.seq_length:,} tokens"]
        parts.append(self.train.describe(num_train_samples))
        for name, source in self.validation.items():
            parts += [f"validation {name}, {len(source):,} samples", source.describe()]
        return "\n".join(parts)


def open_data(config: DataConfig, setting: ModelSetting, tokenizer: Tokenizer) -> DataSets:
    """What a model of this setting trains and validates on; the same on every rank.

    Raises:
        ConfigError, InputError: naming the source that cannot be used.
    """
    virtual_tokens = 0 if setting.peft is None else setting.peft.virtual_tokens
    short = short_vocabulary(setting.model, tokenizer)
    return build_train_and_validation(config, tokenizer, setting.seed, virtual_tokens, setting.model.head or (), short)


def short_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> int | None:
    """The model's vocabulary where that is less than the tokenizer's, so that ids may be beyond it; else None."""
    known = model.vocab_size
    return known if known is not None and known < tokenizer.vocab_size else None


def build_train_and_validation(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    virtual_tokens: int = 0,
    classes: Sequence[str] = (),
    vocab_size: int | None = None,
) -> DataSets:
    """Open every source, check its token ids against the tokenizer, and return training and validation sources.

    With ``virtual_tokens`` every conversation, and every sample of running text, begins with that many negative ids.
    ``classes`` are those of the model's head, for labelled texts. ``vocab_size`` is the model's, where that is less
    than the tokenizer's.

    The same on every rank; ranks that start together on an empty cache build it once. Raises ConfigError and
    InputError, naming the source.
    """
    context = OpenContext(
        config=config,
        tokenizer=tokenizer,
        cache=cache_folder(config.cache_dir),
        virtual_tokens=virtual_tokens,
        classes=tuple(classes),
        vocab_size=tokenizer.vocab_size if vocab_size is None else vocab_size,
    )
    builder = _Builder(context)
    training, *held_out = split_parts(config.split)
    train = builder.blend(config.blend, training, seed, finite=False)
    validation = {}
    for name, blend in config.validation.items():
        part = SourcePart(f"data.validation.{name}", 0.0, 1.0)
        validation[name] = builder.blend(blend, part, _VALIDATION_SEED, finite=True)
    for part in held_out:
        validation["split"] = builder.blend(config.blend, part, _VALIDATION_SEED, finite=True)
    return DataSets(train=train, validation=validation, chat_template=builder.chat_template)


class _Builder:
    """Opens stores (each once) and makes blends of them."""

    def __init__(self, context: OpenContext) -> None:
        config = self._config = context.config
        self._context = context
        self._stores: dict[str, TokenStore] = {}
        self._rules = SampleRules(config, context.tokenizer)
        shorter = dataclasses.replace(config, seq_length=config.seq_length - context.virtual_tokens)
        self._text_rules = SampleRules(shorter, context.tokenizer)

    @property
    def chat_template(self) -> str | None:
        """The template of the conversations that were opened (one for all of them)."""
        return next(filter(None, (store.chat_template for store in self._stores.values())), None)

    def blend(self, entries: Sequence[SourceSection], part: SourcePart, seed: int, *, finite: bool) -> BlendedSource:
        """Return the blend of a part of the entries."""
        sources = [self._source(entry, part, seed) for entry in entries]
        weights = self._weights([entry.weight for entry in entries], sources)
        if finite:  # as many samples as can be had at these weights without repeating any
            names = [source.name for source in sources]
            num_samples = Blend(weights, seed, names).most_samples([source.samples_per_epoch for source in sources])
            return BlendedSource(sources, [Phase(0, tuple(weights))], seed, num_samples)
        return BlendedSource(sources, [Phase(0, tuple(weights)), *self._changes(sources)], seed)

    def _source(self, entry: SourceSection, part: SourcePart, seed: int) -> EndlessSource:
        # Whole documents have their virtual tokens already.
        rules = self._rules if entry.packs else self._text_rules
        runs_on = self._config.packing == "concatenate" and not entry.packs
        kind = source_kind(entry)
        if entry.identity not in self._stores:
            self._stores[entry.identity] = kind.open(self._context)
        store, documents = kind.split(self._stores[entry.identity], part, rules.seq_length + 1 if runs_on else 1)
        key = derive_key("order", seed, entry.name)
        if runs_on:
            source: EndlessSource = TokenWindowDataset(entry.name, store, rules, documents, key)
        else:
            shape = (rules.seq_length, self._config.packing == "none")
            packs = build_packs(store, documents, shape, self._context.cache)
            source = PackedDataset(entry.name, store, rules, documents, key, packs)
        virtual_tokens = 0 if entry.packs else self._context.virtual_tokens
        return VirtualTokenSource(source, virtual_tokens) if virtual_tokens else source

    def _weights(self, given: Sequence[float | None], sources: list[EndlessSource]) -> list[float]:
        """Return the sources' shares of samples from what the configuration says they are shares of."""
        sizes = [float(source.num_tokens) for source in sources]
        weights = [weight for weight in given if weight is not None]
        if self._config.blend_by == "temperature":
            if weights:
                rule = "temperature derives the weights from the sizes, but weights are given too"
                fix = "leave out every weight, or set data.blend_by=samples"
                raise ConfigError([Problem("data.blend_by", self._config.blend_by, rule, fix)])
            largest = max(sizes)
            weights = [(size / largest) ** (1 / self._config.blend_temperature) for size in sizes]
        elif self._config.blend_by == "samples" and weights:
            return weights
        weights = weights or sizes  # shares of tokens: a source with more padding needs more samples for its share
        return [weight / source.tokens_per_sample for weight, source in zip(weights, sources, strict=True)]

    def _changes(self, sources: list[EndlessSource]) -> list[Phase]:
        names = [source.name for source in sources]
        phases = []
        for number, change in enumerate(self._config.blend_changes):
            unknown = sorted(set(change.weights) - set(names))
            if unknown or not sum(change.weights.values()) > 0:
                key = f"data.blend_changes.{number}.weights"
                rule = f"must name sources of data.blend ({', '.join(names)}), one of them with a positive weight"
                raise ConfigError([Problem(key, change.weights, rule, "correct the names and weights")])
            weights = self._weights([change.weights.get(name, 0.0) for name in names], sources)
            phases.append(Phase(change.from_sample, tuple(weights)))
        return phases


_MOST_BYTES = 1 << 24  # 16 MiB of text take some seconds the first time, and nothing once they are in the cache


def describe_data(config: DataConfig, setting: ModelSetting, tokenizer: Tokenizer, num_train_samples: int) -> str:
    """A table of the sources, with the samples and epochs of a run of this length; or why they were not opened.

    Nothing is left behind where the cache cannot be written, as on a machine that is not the run's.

    Raises:
        ConfigError, InputError: what the run itself would refuse: too little text, another tokenizer, bad records.
    """
    unread = sum(source_kind(entry).unread_bytes() for blend in config.blends().values() for entry in blend)
    if unread > _MOST_BYTES:
        return (
            f"data: not opened by this check, which would have to read {unread / 2**20:,.0f} MiB of text, or of "
            "datasets without a manifest, first; text that tools/index_dataset.py has indexed is checked here"
        )
    with tempfile.TemporaryDirectory() as folder:
        if not _writable(cache_folder(config.cache_dir)):
            config = dataclasses.replace(config, cache_dir=folder)
        return open_data(config, setting, tokenizer).describe(num_train_samples)


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)
