"""Sources of few documents: cut by tokens where documents would leave a set empty, and never otherwise."""

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nemo_llm.config.sections.data import DataConfig, parse_split
from nemo_llm.config.sections.labelled import LabelledConfig
from nemo_llm.config.sections.sources import ChatSource, IndexedSource, LabelledSource, MockSource, TextSource
from nemo_llm.data.build import DataSets, build_train_and_validation
from nemo_llm.data.index.build import build_index
from nemo_llm.data.sampling.packed_documents import PackedDataset
from nemo_llm.data.sampling.token_windows import TokenWindowDataset
from nemo_llm.data.sources import split as split_module
from nemo_llm.data.sources.mock import MockStore
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer
from tests.data.test_index import job, write_jsonl

Config = Callable[..., DataConfig]


def write_files(folder: Path, count: int, words: int) -> str:
    """`count` text files of `words` words each, as a glob."""
    draw = random.Random(count)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        text = " ".join(draw.choice(("whale", "ship", "sea", "the", "Ahab", "and")) for _ in range(words))
        (folder / f"{number}.txt").write_text(text + "\n")
    return f"{folder}/*.txt"


def positions(source: TokenWindowDataset | PackedDataset) -> set[int]:
    """Positions in the whole dataset of every token that an epoch reads."""
    found: set[int] = set()
    for index in range(source.samples_per_epoch):
        if isinstance(source, TokenWindowDataset):
            start = source.window_start(index)
            found |= set(range(start, start + source.seq_length + 1))
        else:
            for piece in source._pieces_of(index):
                start = source._store.document_start(int(piece["document"])) + int(piece["offset"])
                found |= set(range(start, start + int(piece["length"])))
    return found


def opened(config: DataConfig, tokenizer: Tokenizer) -> DataSets:
    return build_train_and_validation(config, tokenizer, seed=3)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "none"])
@pytest.mark.parametrize("files", [1, 6, 33])
def test_a_text_of_few_files_gives_both_sets_and_shares_no_token(
    files: int, packing: str, data_config: Config, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    blend = (TextSource(name="mine", path=write_files(tmp_path / "texts", files, 6000 // files)),)
    config = data_config(blend=blend, split="97,3", packing=packing)
    sets = opened(config, demo_tokenizer)
    (training,), (held_out,) = sets.train.sources, sets.validation["split"].sources
    read, kept = positions(training), positions(held_out)
    assert not read & kept
    assert len(sets.validation["split"]) >= 1
    total = training.num_tokens + held_out.num_tokens
    assert abs(held_out.num_tokens / total - 0.03) < 0.001
    if packing != "concatenate":
        assert len(read) + len(kept) == total, "packed samples leave no token out"
    # Once more from the cache, as a resume does: the same samples.
    again = opened(config, demo_tokenizer)
    for old, new in ((sets.train, again.train), (sets.validation["split"], again.validation["split"])):
        for index in range(2):
            np.testing.assert_array_equal(old[index].tokens, new[index].tokens)


def test_an_indexed_dataset_of_few_documents_is_cut_and_the_log_says_so(
    data_config: Config, demo_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(split_module._log, "info", lambda text, *values: said.append(text % values))
    source = write_jsonl(tmp_path / "big.jsonl", ["the whale and the sea " * 400] * 3)
    build_index(job([source], tmp_path / "d"))
    blend = (IndexedSource(name="books", path=str(tmp_path / "d")),)
    sets = opened(data_config(blend=blend, split="95,5"), demo_tokenizer)
    (line,) = said
    (training,), (held_out,) = sets.train.sources, sets.validation["split"].sources
    for wanted in ("source books", "data.split=95,5", f"{training.num_tokens:,} for training", "3 documents"):
        assert wanted in line
    assert f"{held_out.num_tokens:,} for validation" in line
    assert held_out.documents_of(0) == [(2, 2)], "documents keep their numbers"


def test_sources_that_can_be_cut_between_documents_are_cut_there(
    data_config: Config, demo_tokenizer: Tokenizer
) -> None:
    """Drawn sources: whatever shares of documents, rounded, can serve is served by them, to the token."""
    draw = random.Random(20261129)
    ways: Counter[str] = Counter()
    for _ in range(120):
        count, mean = draw.choice((1, 2, 5, 20, 60)), draw.choice((8, 40, 300))
        mock = MockSource(name="m", num_documents=count, mean_document_length=mean)
        split, seq_length = draw.choice(("99,1", "97,3", "90,5,5", "50,50", "1,0")), draw.choice((16, 64))
        config = data_config(blend=(mock,), split=split, seq_length=seq_length)
        store = MockStore(count, mean, demo_tokenizer.vocab_size, 0)
        train, held = parse_split(split)
        shares = [0.0, train, train + held] if held > 0 else [0.0, train]
        by_documents = [store.document_start(round(share * store.num_documents)) for share in shares]
        by_tokens = [round(share * store.num_tokens) for share in shares]
        way, edges = next(
            (
                (name, edges)
                for name, edges in (("documents", by_documents), ("tokens", by_tokens))
                if min(b - a for a, b in pairwise(edges)) > seq_length
            ),
            ("refused", []),
        )
        ways[way] += 1
        if way == "refused":
            with pytest.raises(InputError, match="source m"):
                opened(config, demo_tokenizer)
            continue
        sets = opened(config, demo_tokenizer)
        sources = [sets.train.sources[0], *(source.sources[0] for source in sets.validation.values())]
        assert [(one.first_token, one.first_token + one.num_tokens) for one in sources] == list(pairwise(edges)), config
    assert min(ways.values()) >= 10, ways
    assert len(ways) == 3


def test_too_little_text_names_source_set_and_key(
    data_config: Config, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    blend = (TextSource(name="mine", path=write_files(tmp_path / "texts", 1, 600)),)
    config = data_config(blend=blend, split="97,3")
    with pytest.raises(
        InputError, match=r"source mine: data.split=97,3 leaves \d+ of its [\d,]+ tokens for validation"
    ) as e:
        opened(config, demo_tokenizer)
    assert "data.seq_length + 1" in str(e.value)
    assert "data.split=null" in str(e.value)
    proposed = str(e.value).partition("set data.split=")[2].partition(", give")[0]
    assert opened(data_config(blend=blend, split=proposed), demo_tokenizer).validation
    assert not opened(data_config(blend=blend, split=None), demo_tokenizer).validation

    tiny = (TextSource(name="tiny", path=write_files(tmp_path / "tiny", 2, 4)),)
    with pytest.raises(InputError, match=r"leaves .* for validation") as e:
        opened(data_config(blend=tiny, split="97,3"), demo_tokenizer)
    assert "set data.split=9" not in str(e.value), "no split helps here"
    with pytest.raises(InputError, match=r"^source tiny holds \d+ tokens, but one sample needs 65"):
        opened(data_config(blend=tiny, split=None), demo_tokenizer)
    with pytest.raises(InputError, match=r"^data\.validation\.held: source tiny holds"):
        opened(data_config(split=None, validation={"held": tiny}), demo_tokenizer)


@pytest.mark.parametrize("kind", ["chat", "labelled"])
def test_few_conversations_or_labelled_texts_name_the_way_out(
    kind: str, data_config: Config, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    record = {"chat": lambda n: {"messages": messages}, "labelled": lambda n: {"text": f"text {n}", "label": "a"}}
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(record[kind](number)) + "\n" for number in range(7)))
    blend = ({"chat": ChatSource, "labelled": LabelledSource}[kind](name="few", path=str(path)),)
    changes = {"reset_attention_mask": True, "reset_position_ids": True, "packing": "best_fit"}
    labelled = LabelledConfig(label_key="label", too_long="error")

    def sets(split: str | None) -> DataSets:
        config = data_config(blend=blend, split=split, labelled=labelled, **changes)
        return build_train_and_validation(config, demo_tokenizer, 3, classes=("a", "b"))

    split = "95,5" if kind == "chat" else "9999,1"
    with pytest.raises(InputError, match=f"source few: data.split={split} leaves none of its 7") as e:
        sets(split)
    assert "for validation" in str(e.value)
    assert "data.split=null" in str(e.value)
    proposed = str(e.value).partition("set data.split=")[2].partition(", give")[0]
    assert len(sets(proposed).validation["split"]) >= 1
    assert sets(None).validation == {}
