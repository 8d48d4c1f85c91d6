"""Packing, fill-in-the-middle, changes of the blend, ramps of the context, and the ledger."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.config.sections.data import BlendChange, FimConfig, SeqLengthRamp
from nemo_llm.config.sections.sources import MockSource, TextSource
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.sampling.blend_history import check_blend_history
from nemo_llm.data.sampling.fim import FimRules
from nemo_llm.data.sampling.packed_documents import best_fit
from nemo_llm.data.sampling.sample_provenance import ledger
from nemo_llm.errors import ConfigError
from nemo_llm.tokenizers.tokenizer import load_tokenizer
from tests.data.conftest import tokenizer_config

ROOT = Path(__file__).resolve().parents[2]
MOCKS = tuple(
    MockSource(name=name, weight=weight, num_documents=count, mean_document_length=40)
    for name, weight, count in (("a", 0.5, 300), ("b", 0.3, 200), ("c", 0.2, 100))
)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 33), min_size=1, max_size=200))
def test_best_fit_packs_every_item_once_within_capacity(lengths: list[int]) -> None:
    order, counts = best_fit(np.asarray(lengths), 33)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert counts.sum() == len(lengths)
    sizes = [int(np.asarray(lengths)[pack].sum()) for pack in np.split(order, np.cumsum(counts)[:-1])]
    assert max(sizes) <= 33
    # Best-fit decreasing needs at most 11/9 of the best number of packs, and 6/9 more (Dosa 2007).
    assert len(sizes) <= 11 / 9 * max(1, -(-sum(lengths) // 33)) * 1.5 + 1
    assert sum(size * 2 <= 33 for size in sizes) <= 1  # two half-empty packs would have been one


def test_packed_samples_hold_whole_documents(data_config, demo_tokenizer) -> None:
    changes = {"packing": "best_fit", "reset_attention_mask": True, "reset_position_ids": True, "split": None}
    config = data_config(blend=MOCKS[:1], seq_length=128, **changes)
    train = build_train_and_validation(config, demo_tokenizer, seed=3).train
    (source,) = train.sources
    store = source._store
    seen: Counter[int] = Counter()
    for index in range(source.samples_per_epoch):
        sample = train[index]
        position = 0
        for piece in source._pieces_of(index):
            seen[int(piece["document"])] += int(piece["length"])
            start = store.document_start(int(piece["document"])) + int(piece["offset"])
            length = int(piece["length"])
            np.testing.assert_array_equal(sample.tokens[position : position + length], store.read(start, length))
            if position + length <= 128:
                assert (sample.position_ids[position : position + length] == np.arange(length)).all()
                assert len(set(sample.document_ids[position : position + length])) == 1
                # No label of a document belongs to the next.
                assert sample.loss_mask[position : position + length - 1].all()
                assert sample.loss_mask[position + length - 1 : position + length].sum() == 0
            position += length
        assert (sample.tokens[position:] == demo_tokenizer.eod_id).all()
        assert sample.loss_mask[max(0, position - 1) :].sum() == 0
    expected = {n: store.document_start(n + 1) - store.document_start(n) for n in range(store.num_documents)}
    assert seen == expected  # every token of every document once an epoch
    assert source.tokens_per_sample > 0.97 * 129
    again = build_train_and_validation(config, demo_tokenizer, seed=3).train
    np.testing.assert_array_equal(again[7].tokens, train[7].tokens)


def test_share_of_tokens_counts_what_is_not_padding(data_config, demo_tokenizer) -> None:
    """Documents just above half a sample leave nearly half of it free; their source needs more samples."""
    blend = (
        TextSource(name="a", weight=0.5, path="asset:shakespeare"),
        MockSource(name="b", weight=0.5, num_documents=1000, mean_document_length=400),
    )
    config = data_config(blend=blend, split=None, packing="best_fit", seq_length=2000, blend_by="tokens")
    train = build_train_and_validation(config, demo_tokenizer, seed=3).train
    counts = train.counts(100_000)
    tokens = [count * source.tokens_per_sample for count, source in zip(counts, train.sources, strict=True)]
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)
    assert counts[0] != counts[1]


def test_blend_change_keeps_the_past_and_each_sources_position(data_config, demo_tokenizer) -> None:
    changes = (
        BlendChange(from_sample=101, weights={"a": 0.1, "b": 0.9}),
        BlendChange(from_sample=150, weights={"b": 0.5, "d": 0.5}),
    )
    new = MockSource(name="d", weight=0.0, num_documents=70, mean_document_length=40)
    plain = build_train_and_validation(data_config(blend=MOCKS, split=None), demo_tokenizer, seed=3).train
    config = data_config(blend=(new, *MOCKS), split=None, blend_changes=changes)
    changed = build_train_and_validation(config, demo_tokenizer, seed=3).train
    for index in range(101):  # sources that come later do not disturb what was read
        source, local = plain.locate(index)
        assert changed.locate(index) == (source + 1, local)
        np.testing.assert_array_equal(changed[index].tokens, plain[index].tokens)
    positions = {number + 1: count for number, count in enumerate(plain.counts(101))} | {0: 0}
    given_since: Counter[int] = Counter()
    for index in range(101, 400):
        source, local = changed.locate(index)
        assert local == positions[source]  # each goes on from where it stood
        positions[source] += 1
        given_since[source] += index >= 150
        assert source != 3  # c is left out
    assert changed.counts(400) == [positions[number] for number in range(4)]
    assert given_since[0] == pytest.approx(125, abs=35)
    assert given_since[1] == 0
    assert "from sample 101" in changed.describe(400)


def test_blend_change_with_unknown_source_is_refused(data_config, demo_tokenizer) -> None:
    config = data_config(blend_changes=(BlendChange(from_sample=5, weights={"wiki": 1.0}),))
    with pytest.raises(ConfigError, match=r"data\.blend_changes\.0\.weights"):
        build_train_and_validation(config, demo_tokenizer, seed=3)
    with pytest.raises(ValueError, match="must rise"):
        data_config(blend_changes=config.blend_changes * 2)


def fim_config(**changes: object) -> FimConfig:
    keys = {"rate": 1.0, "spm_rate": 0.0, "prefix_token": "A", "middle_token": "B", "suffix_token": "C"}
    return FimConfig(**(keys | changes))


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_fim_rearranges_a_document_without_loss(spm_rate: float, demo_tokenizer) -> None:
    rules = FimRules(1.0, spm_rate, 2044, 2045, 2046, demo_tokenizer)
    text = "The whale swam on, and nobody spoke for a while."
    document = np.asarray(demo_tokenizer.encode(text))
    cuts = set()
    for key in range(200):
        ids = rules.apply(document, key).tolist()
        assert ids == rules.apply(document, key).tolist()
        assert ids[0] == 2044
        suffix_at, middle_at = ids.index(2046), ids.index(2045)
        assert suffix_at < middle_at
        suffix = demo_tokenizer.decode(ids[suffix_at + 1 : middle_at])
        if spm_rate:
            assert suffix_at == 1
            assert demo_tokenizer.decode(ids[middle_at + 1 :]) + suffix == text
        else:
            prefix, middle = demo_tokenizer.decode(ids[1:suffix_at]), demo_tokenizer.decode(ids[middle_at + 1 :])
            assert prefix + middle + suffix == text
            cuts.add(len(prefix))
    assert spm_rate or len(cuts) > 20


def test_fim_in_samples(data_config, demo_tokenizer) -> None:
    ids = {token: demo_tokenizer.token_id(token) for token in "ABC"}
    changes = {"seq_length": 4000, "fim": fim_config(rate=0.5), "reset_attention_mask": True, "split": None}
    with_fim = build_train_and_validation(data_config(**changes), demo_tokenizer, seed=3).train
    without = build_train_and_validation(data_config(**(changes | {"fim": None})), demo_tokenizer, seed=3).train
    rearranged = 0
    for index in range(12):
        one, other = with_fim[index], without[index]
        assert one.tokens.shape == other.tokens.shape == (4001,)
        np.testing.assert_array_equal(one.tokens, with_fim[index].tokens)
        if (one.tokens == other.tokens).all():
            continue
        rearranged += 1
        begins = np.flatnonzero(np.diff(one.document_ids, prepend=-1))
        assert any(one.tokens[begin] == ids["A"] for begin in begins)
        # The ends of documents stay where documents end.
        ends = np.flatnonzero(one.tokens[:-1] == demo_tokenizer.eod_id)
        assert set(ends[ends < 3999] + 1) <= set(begins)
    assert rearranged > 4
    with pytest.raises(ConfigError, match=r"data\.fim\.middle_token = '<FIM>'"):
        build_train_and_validation(data_config(fim=fim_config(middle_token="<FIM>")), demo_tokenizer, seed=3)
    byte = load_tokenizer(tokenizer_config(type="byte", path=None))
    with pytest.raises(ConfigError, match=r"data\.fim"):
        build_train_and_validation(data_config(fim=fim_config()), byte, seed=3)


def test_context_ramp_doubles_and_ends(data_config, demo_tokenizer) -> None:
    ramp = SeqLengthRamp(start_seq_length=8, ramp_samples=30)
    config = data_config(blend=MOCKS, split=None, seq_length=64, seq_length_ramp=ramp)
    train = build_train_and_validation(config, demo_tokenizer, seed=3).train
    for index, chunk in ((0, 8), (9, 8), (10, 16), (20, 32), (29, 32)):
        sample = train[index]
        np.testing.assert_array_equal(sample.document_ids, np.arange(64) // chunk)
        np.testing.assert_array_equal(sample.position_ids, np.arange(64) % chunk)
    assert train[30].document_ids is None
    plain = build_train_and_validation(data_config(blend=MOCKS, split=None, seq_length=64), demo_tokenizer, 3).train
    np.testing.assert_array_equal(train[5].tokens, plain[5].tokens)  # the same tokens in the same order


def test_ledger_names_the_documents_of_each_sample(data_config, demo_tokenizer) -> None:
    for packing in ("concatenate", "best_fit"):
        config = data_config(packing=packing, seq_length=512)
        train = build_train_and_validation(config, demo_tokenizer, seed=3).train
        for entry in ledger(train, 0, 40):
            source, _ = train.locate(entry.sample)
            store = train.sources[source].store if packing == "concatenate" else train.sources[source]._store
            start, stop = store.document_start(entry.first_document), store.document_start(entry.last_document + 1)
            text = store.read(start, stop - start)
            tokens = train[entry.sample].tokens
            piece = tokens[:20] if packing == "concatenate" else text[:20]
            where = text if packing == "concatenate" else tokens
            places = np.lib.stride_tricks.sliding_window_view(where, len(piece))
            assert (places == piece).all(axis=1).any() or len(text) > 513  # a long document is in several samples


def test_ledger_command(tmp_path: Path) -> None:
    cfg = compose(["+model=gpt_tiny", "trainer.global_batch_size=4", f"data.cache_dir={tmp_path}/cache"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(cfg)))))
    tool = [sys.executable, str(ROOT / "tools" / "inspect_dataset.py"), "ledger"]
    command = [*tool, "--run", str(tmp_path / "run"), "--steps", "3:5"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["sample"] for line in lines] == list(range(8, 16))
    assert {line["step"] for line in lines} == {3, 4}
    assert {line["source"] for line in lines} <= {"shakespeare", "moby_dick"}
    result = subprocess.run([*command[:-1], "0:5"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 2


def test_blend_history_tells_what_would_change_the_past(data_config) -> None:
    change = BlendChange(from_sample=100, weights={"a": 1.0})
    saved = data_config(blend=MOCKS, split=None, blend_changes=(change,))
    new = MockSource(name="d", weight=0.0, num_documents=70, mean_document_length=40)
    later = BlendChange(from_sample=200, weights={"d": 1.0, "b": 1.0})

    def problems(consumed: int, **changes: object) -> list[str]:
        config = data_config(**({"blend": MOCKS, "split": None, "blend_changes": (change,)} | changes))
        return [str(problem) for problem in check_blend_history(saved, config, consumed)]

    assert problems(200, blend=(new, *MOCKS), blend_changes=(change, later)) == []
    (message,) = problems(201, blend=(new, *MOCKS), blend_changes=(change, later))
    assert "from number 200 on" in message
    assert "from_sample: 201" in message
    assert problems(100, blend_changes=()) == []  # not begun yet
    assert len(problems(101, blend_changes=())) == 1
    assert len(problems(1, blend=MOCKS[::-1])) == 1
    doubled = tuple(replace(source, weight=2 * (source.weight or 0)) for source in MOCKS)
    assert problems(150, blend=doubled) == []  # the same shares
    moved = (MockSource(name="a", weight=0.5, num_documents=5, mean_document_length=9), *MOCKS[1:])
    (message,) = problems(1, blend=moved)
    assert "data.blend (a)" in message
