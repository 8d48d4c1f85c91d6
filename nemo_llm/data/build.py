"""From the ``data`` section of the configuration to training and validation sources."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_llm.config.sections.data import BlendSource, DataConfig, blend_entries
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.sampling.blend_order import Blend
from nemo_llm.data.sampling.blended_source import BlendedSource, Phase
from nemo_llm.data.sampling.keyed_permutation import derive_key
from nemo_llm.data.sampling.packed_documents import PackedDataset, build_packs
from nemo_llm.data.sampling.token_windows import Source, TokenWindowDataset
from nemo_llm.data.sampling.virtual_tokens import VirtualTokenSource
from nemo_llm.data.sampling.window_to_sample import SampleRules
from nemo_llm.data.sources.chats import ChatStore, open_chats
from nemo_llm.data.sources.labelled_texts import LabelRules, open_labelled
from nemo_llm.data.sources.raw_text import open_text
from nemo_llm.data.sources.split import SourcePart, TokenRange, cut, split_parts
from nemo_llm.data.sources.token_store import MockStore, TokenStore
from nemo_llm.errors import ConfigError, InputError, Problem
from nemo_llm.storage.build_cache import build_once, cache_folder, content_key
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


def open_data(cfg: RunConfig, tokenizer: Tokenizer) -> DataSets:
    """What the run of a configuration trains and validates on; the same on every rank.

    Raises:
        ConfigError, InputError: naming the source that cannot be used.
    """
    virtual_tokens = 0 if cfg.peft is None else cfg.peft.virtual_tokens
    short = short_vocabulary(cfg, tokenizer)
    return build_train_and_validation(
        cfg.data, tokenizer, cfg.trainer.seed, virtual_tokens, cfg.model.head or (), short
    )


def short_vocabulary(cfg: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The model's vocabulary where that is less than the tokenizer's, so that ids may be beyond it; else None."""
    known = cfg.model.vocab_size
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
    builder = _Builder(config, tokenizer, virtual_tokens, classes, vocab_size)
    training, *held_out = split_parts(config.split)
    train_entries = blend_entries(config.blend, "data.blend")
    train = builder.blend(train_entries, training, seed, finite=False)
    validation = {}
    for name, blend in config.validation.items():
        part = SourcePart(f"data.validation.{name}", 0.0, 1.0)
        validation[name] = builder.blend(blend_entries(blend, part.name), part, _VALIDATION_SEED, finite=True)
    for part in held_out:
        validation["split"] = builder.blend(train_entries, part, _VALIDATION_SEED, finite=True)
    return DataSets(train=train, validation=validation, chat_template=builder.chat_template)


class _Builder:
    """Opens stores (each once) and makes blends of them."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        virtual_tokens: int,
        classes: Sequence[str],
        vocab_size: int | None,
    ) -> None:
        self._config = config
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._classes = tuple(classes)
        self._virtual_tokens = virtual_tokens
        self._tokenizer = tokenizer
        self._cache = cache_folder(config.cache_dir)
        self._stores: dict[str, TokenStore] = {}
        self._rules = SampleRules(config, tokenizer)
        shorter = dataclasses.replace(config, seq_length=config.seq_length - virtual_tokens)
        self._text_rules = SampleRules(shorter, tokenizer)

    @property
    def chat_template(self) -> str | None:
        """The template of the conversations that were opened (one for all of them)."""
        stores = (store for store in self._stores.values() if isinstance(store, ChatStore))
        return next((store.chat_template for store in stores if store.chat_template is not None), None)

    def blend(self, entries: tuple[BlendSource, ...], part: SourcePart, seed: int, *, finite: bool) -> BlendedSource:
        """Return the blend of a part of the entries."""
        sources = [self._source(entry, part, seed) for entry in entries]
        weights = self._weights([entry.weight for entry in entries], sources)
        if finite:  # as many samples as can be had at these weights without repeating any
            names = [source.name for source in sources]
            num_samples = Blend(weights, seed, names).most_samples([source.samples_per_epoch for source in sources])
            return BlendedSource(sources, [Phase(0, tuple(weights))], seed, num_samples)
        return BlendedSource(sources, [Phase(0, tuple(weights)), *self._changes(sources)], seed)

    def _source(self, entry: BlendSource, part: SourcePart, seed: int) -> Source:
        runs_on = self._config.packing == "concatenate"
        smallest = self._text_rules.seq_length + 1 if runs_on else 1
        store, documents = cut(entry.name, self._store(entry), part, smallest)
        key = derive_key("order", seed, entry.name)
        if isinstance(store, ChatStore):
            return self._packed(entry.name, store, documents, key, self._rules)
        rules = self._text_rules
        if runs_on:
            source: Source = TokenWindowDataset(entry.name, store, rules, documents, key)
        else:
            source = self._packed(entry.name, store, documents, key, rules)
        return VirtualTokenSource(source, self._virtual_tokens) if self._virtual_tokens else source

    def _packed(
        self, name: str, store: TokenStore, documents: tuple[int, int], key: int, rules: SampleRules
    ) -> PackedDataset:
        alone = self._config.packing == "none"
        packs = build_packs(store, documents, (rules.seq_length, alone), _identity(store), self._cache)
        return PackedDataset(name, store, rules, documents, key, packs)

    def _weights(self, given: Sequence[float | None], sources: list[Source]) -> list[float]:
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

    def _changes(self, sources: list[Source]) -> list[Phase]:
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

    def _store(self, entry: BlendSource) -> TokenStore:
        place = entry.prefix or entry.text or entry.chat or entry.labelled or f"mock {entry.mock}"
        if place not in self._stores:
            self._stores[place] = self._open(entry)
        return self._stores[place]

    def _open(self, entry: BlendSource) -> TokenStore:
        if entry.mock is not None:
            mock = entry.mock
            return MockStore(mock.num_documents, mock.mean_document_length, self._vocab_size, self._tokenizer.eod_id)
        if entry.text is not None:
            text_key, tokenizer = self._config.text_key, self._config.tokenizer
            dataset = open_text(entry.text, text_key, tokenizer, self._tokenizer, self._cache)
            self._check_tokens(dataset, entry.name)
            return dataset
        if entry.chat is not None:
            return open_chats(entry.chat, self._config, self._tokenizer, self._cache, self._virtual_tokens)
        if entry.labelled is not None:
            labelled = self._config.labelled
            assert labelled is not None
            capacity, virtual = self._config.seq_length, self._virtual_tokens
            rules = LabelRules(self._config.text_key, labelled, self._classes, capacity, virtual)
            return open_labelled(entry.labelled, self._tokenizer, self._cache, rules)
        assert entry.prefix is not None
        dataset = IndexedDataset(entry.prefix)
        self._check_tokens(dataset, entry.name)
        return dataset

    def _check_tokens(self, dataset: IndexedDataset, name: str) -> None:
        """Refuse a dataset made with another tokenizer or holding ids beyond a vocabulary (InputError)."""
        tokenizer = self._tokenizer
        largest = _largest_token(dataset, name, tokenizer, self._cache)
        found = f"source {name}: {dataset.bin_path} holds token id {largest}, but"
        if largest >= tokenizer.vocab_size:
            raise InputError(
                f"{found} the tokenizer has {tokenizer.vocab_size} ids; set data.tokenizer to the one that made this "
                "dataset"
            )
        if largest >= self._vocab_size:
            raise InputError(
                f"{found} the model knows {self._vocab_size}; set model.vocab_size to {largest + 1} or more, or to null"
            )


def _largest_token(dataset: IndexedDataset, name: str, tokenizer: Tokenizer, cache: Path) -> int:
    """Return the largest id, from the dataset's manifest, an earlier scan, or a full scan made once."""
    manifest_path = Path(dataset.prefix + ".manifest.json")
    sizes = {path.suffix: path.stat().st_size for path in (dataset.idx_path, dataset.bin_path)}
    if manifest_path.is_file():
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            recorded = {suffix: manifest["files"][suffix]["bytes"] for suffix in sizes}
            fingerprint, largest = manifest["tokenizer"]["fingerprint"], int(manifest["max_token_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest_path}: damaged manifest ({error!r}); remove it or rebuild the data") from error
        if recorded != sizes:
            raise InputError(f"{dataset.prefix}: files have {sizes} bytes, the manifest says {recorded}; rebuild")
        if fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"source {name}: {dataset.prefix} was made with tokenizer {manifest['tokenizer'].get('name')} "
                f"({fingerprint[:12]}), the run uses another one ({tokenizer.fingerprint[:12]}); set data.tokenizer to "
                "the one of the data, or index the text again"
            )
        return largest
    key = content_key(kind="scan", dataset=_identity(dataset))
    return int(build_once(cache / f"scan-{key}", lambda _: {"max_token_id": dataset.validate()})["max_token_id"])


def _identity(store: TokenStore) -> object:
    """Return what names the content of a store: of a dataset on disk its place, sizes and times of change."""
    if isinstance(store, TokenRange):
        return [_identity(store.store), store.first, store.last]
    if isinstance(store, MockStore | ChatStore):
        return store.prefix
    stats = [Path(f"{store.prefix}{suffix}").stat() for suffix in (".idx", ".bin")]
    return [str(Path(store.prefix).resolve()), [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
