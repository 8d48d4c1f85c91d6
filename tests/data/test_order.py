"""The order of samples: permutations, blends, windows, and the loader that hands them to ranks."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_llm.config.sections.sources import MockSource, TextSource
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.loader import MicroBatchLoader
from nemo_llm.data.sampling.blend_order import Blend
from nemo_llm.data.sampling.blended_source import BlendedSource
from nemo_llm.data.sampling.keyed_permutation import KeyedPermutation, derive_key
from nemo_llm.data.sampling.token_windows import TokenWindowDataset
from nemo_llm.data.sampling.window_to_sample import SampleRules
from nemo_llm.data.sources.mock import MockStore
from nemo_llm.errors import ConfigError, InputError


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1024, 1025, 4096, 5000])
def test_permutation_is_a_bijection(size: int) -> None:
    permutation = KeyedPermutation(size, derive_key("test", size))
    images = [permutation(index) for index in range(size)]
    assert sorted(images) == list(range(size))
    with pytest.raises(IndexError):
        permutation(size)


def test_permutation_looks_random() -> None:
    size = 100_000
    images, other = (
        np.fromiter(map(KeyedPermutation(size, derive_key(name)), range(size)), np.int64) for name in ("test", "test2")
    )
    assert abs(np.corrcoef(images, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(images, other)[0, 1]) < 0.02
    assert (images == np.arange(size)).sum() < 10  # one fixed point is expected
    # Neighbours go far apart: the mean distance of two random numbers is a third of the range.
    assert abs(np.abs(np.diff(images)).mean() / size - 1 / 3) < 0.01
    counts = np.bincount(images[: size // 10] * 20 // size, minlength=20)  # the first tenth is spread evenly
    assert counts.min() > 400
    assert counts.max() < 600


def test_permutation_of_huge_size_is_cheap_and_stable() -> None:
    permutation = KeyedPermutation(3_700_000_000, derive_key("order", 1234, "web"))
    # Pinned: these must never change, or a resumed run would read other data.
    assert [permutation(index) for index in (0, 1, 3_699_999_999)] == PINNED


NAMES = list("abcdefghi")
PINNED = [3614269946, 2730439523, 2294811118]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=9).filter(sum),
    seed=st.integers(0, 5),
    total=st.integers(1, 700),
)
def test_blend_gives_each_source_its_share_without_gaps(weights: list[float], seed: int, total: int) -> None:
    blend = Blend(weights, seed, NAMES)
    positions: Counter[int] = Counter()
    for index in range(total):
        source, local = blend.locate(index)
        assert local == positions[source]  # 0, 1, 2, ... for each source
        positions[source] += 1
        if index % 64 == 63:
            assert blend.counts(index + 1) == [positions[number] for number in range(len(weights))]
    assert blend.counts(total) == [positions[number] for number in range(len(weights))]
    for number, share in enumerate(blend.shares):
        # At most one block's rounding a level of the tree, and the block that is still open.
        assert abs(positions[number] - share * total) <= 70
        assert share > 0 or positions[number] == 0


def test_blend_share_is_exact_over_many_samples() -> None:
    blend = Blend([0.7, 0.2, 0.1, 1e-5], 1, NAMES)
    counts = blend.counts(10**9)
    assert sum(counts) == 10**9
    for count, share in zip(counts, blend.shares, strict=True):
        assert abs(count - share * 10**9) < 4


@pytest.fixture
def windows(data_config, demo_tokenizer) -> Callable[..., TokenWindowDataset]:
    def build(num_documents: int = 50, seq_length: int = 16, **changes: object) -> TokenWindowDataset:
        rules = SampleRules(data_config(seq_length=seq_length, **changes), demo_tokenizer)
        store = MockStore(num_documents, 20, vocab_size=100, eod_id=demo_tokenizer.eod_id)
        return TokenWindowDataset("mock", store, rules, (0, num_documents), derive_key("order", 7, "mock"))

    return build


def test_each_epoch_visits_each_window_once_and_no_token_twice(windows) -> None:
    data = windows()
    count = data.samples_per_epoch
    starts = [sorted(data.window_start(epoch * count + index) for index in range(count)) for epoch in range(3)]
    for epoch in starts:
        assert set(np.diff(epoch)) == {16}
        assert epoch[0] >= 0
        assert epoch[-1] + 17 <= data.store.num_tokens
    orders = [[data.window_start(epoch * count + index) for index in range(count)] for epoch in range(2)]
    assert orders[0] != orders[1]
    assert orders[0] != starts[0]


def test_sample_holds_the_tokens_of_its_window(windows) -> None:
    data = windows()
    everything = data.store.read(0, data.store.num_tokens)
    for index in (0, 5, 77):
        start = data.window_start(index)
        np.testing.assert_array_equal(data.sample(index, index).tokens, everything[start : start + 17])
    assert not data.sample(0, 0).loss_mask.flags.writeable  # shared between samples


def test_resets_follow_document_boundaries_as_megatron_does(windows, demo_tokenizer) -> None:
    torch = pytest.importorskip("torch")
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    data = windows(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True, seq_length=64)
    for index in range(data.samples_per_epoch):
        sample = data.sample(index, index)
        mask, loss_mask, position_ids = gpt_dataset._get_ltor_masks_and_position_ids(
            torch.from_numpy(sample.tokens[:-1]), demo_tokenizer.eod_id, True, True, True, True
        )
        np.testing.assert_array_equal(sample.position_ids, position_ids)
        np.testing.assert_array_equal(sample.loss_mask, loss_mask)
        ids = sample.document_ids
        allowed = (ids[:, None] == ids[None, :]) & np.tri(64, dtype=bool)
        np.testing.assert_array_equal(allowed, ~mask[0].numpy())


def test_source_shorter_than_one_sample_is_refused(windows) -> None:
    with pytest.raises(InputError, match=r"mock: documents 0 to 1 hold \d+ tokens, but one sample needs .* = 5001"):
        windows(num_documents=1, seq_length=5000)


def test_order_does_not_depend_on_ranks_batches_or_prefetch(data_config, demo_tokenizer) -> None:
    source = build_train_and_validation(data_config(), demo_tokenizer, seed=5).train
    expected = np.stack([source[index].tokens[:-1] for index in range(48)])

    for dp_size, micro_batch_size, prefetch, ramp in [(1, 8, 0, [48]), (2, 4, 3, [16, 16, 16]), (4, 2, 1, [8, 16, 24])]:
        seen = np.zeros_like(expected)
        for rank in range(dp_size):
            with MicroBatchLoader(
                source, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size, prefetch=prefetch
            ) as loader:
                consumed = 0
                for global_batch_size in ramp:
                    for number, batch in enumerate(loader.micro_batches(consumed, global_batch_size)):
                        first = consumed + (number * dp_size + rank) * micro_batch_size
                        seen[first : first + micro_batch_size] = batch["tokens"]
                        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
                    consumed += global_batch_size
        np.testing.assert_array_equal(seen, expected)


def test_loader_jumps_and_passes_errors_on(data_config, demo_tokenizer) -> None:
    data = build_train_and_validation(data_config(), demo_tokenizer, seed=5)
    with MicroBatchLoader(data.train, dp_rank=0, dp_size=1, micro_batch_size=2, prefetch=4) as loader:
        first = next(loader.micro_batches(0, 8))["tokens"]
        list(loader.micro_batches(100, 8))
        np.testing.assert_array_equal(next(loader.micro_batches(0, 8))["tokens"], first)
    validation = data.validation["split"]
    with MicroBatchLoader(validation, dp_rank=0, dp_size=1, micro_batch_size=1, prefetch=4) as loader:
        assert len(list(loader.micro_batches(0, len(validation)))) == len(validation)
        with pytest.raises(IndexError, match=f"beyond the {len(validation)} samples"):
            list(loader.micro_batches(len(validation), 1))


def test_split_and_validation_sets_are_disjoint_and_fixed(data_config, demo_tokenizer) -> None:
    config = data_config(validation={"bard": (TextSource(name="bard", path="asset:shakespeare"),)})
    one, other = (build_train_and_validation(config, demo_tokenizer, seed=seed) for seed in (1, 2))
    assert [len(source) for source in one.validation.values()] == [len(s) for s in other.validation.values()]
    for name, source in one.validation.items():
        np.testing.assert_array_equal(source[0].tokens, other.validation[name][0].tokens)
        # No window of a validation set comes twice.
        places = [source.locate(index) for index in range(len(source))]
        starts = [(number, source.sources[number].window_start(local)) for number, local in places]
        assert len(set(starts)) == len(starts)
    assert one.train[0].tokens.tolist() != other.train[0].tokens.tolist()
    for training, held_out in zip(one.train.sources, one.validation["split"].sources, strict=True):
        assert training.first_token + training.num_tokens == held_out.first_token
    table = one.describe(1000)
    assert "shakespeare" in table
    assert "0.7500" in table


def shares_of(source: BlendedSource) -> list[float]:
    counts = source.counts(10**9)
    return [count / 10**9 for count in counts]


def test_temperature_flattens_sizes(data_config, demo_tokenizer) -> None:
    blend = tuple(MockSource(name=f"m{count}", num_documents=count, mean_document_length=50) for count in (100, 10_000))
    shares = {}
    for temperature in (1.0, 4.0):
        config = data_config(blend=blend, split=None, blend_by="temperature", blend_temperature=temperature)
        source = build_train_and_validation(config, demo_tokenizer, seed=1).train
        shares[temperature] = shares_of(source)[0]
        sizes = np.array([one.num_tokens for one in source.sources], dtype=float) ** (1 / temperature)
        assert shares_of(source)[0] == pytest.approx(sizes[0] / sizes.sum(), rel=1e-6)
    assert shares[4.0] > 10 * shares[1.0]
    with pytest.raises(ConfigError, match=r"data\.blend_by"):
        build_train_and_validation(data_config(blend_by="temperature"), demo_tokenizer, seed=1)
