"""Indexed datasets: the same bytes as Megatron's builder, read both ways, and clear errors for damaged files."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from nemo_llm.data.index.format import IndexedDataset, IndexedDatasetWriter, token_dtype
from nemo_llm.errors import InputError

DOCUMENTS = [[[5, 7, 9], [1]], [[65_499]], [[]], [[2, 3], [4, 5, 6]]]  # sequences of each document


def tokens_of(sequences: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(sequences))


def write(prefix: Path, dtype: np.dtype) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in DOCUMENTS:
            writer.add_document(tokens_of(sequences), [len(sequence) for sequence in sequences])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path / "d", np.dtype("<u2"))
    return tmp_path / "d"


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_same_bytes_as_megatron_and_read_by_it(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "ours", np.dtype(dtype))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for sequences in DOCUMENTS:
        builder.add_document(torch.tensor(tokens_of(sequences)), [len(sequence) for sequence in sequences])
    builder.finalize(str(tmp_path / "theirs.idx"))

    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert len(theirs) == len(ours) == 6
    for number in range(6):
        np.testing.assert_array_equal(theirs[number], ours[number])
    assert [ours.document(number).tolist() for number in range(4)] == [tokens_of(sequences) for sequences in DOCUMENTS]


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_535, 65_536, 65_537])
def test_dtype_is_what_both_megatron_readers_take(tmp_path: Path, vocab_size: int) -> None:
    """The reader without a header derives the dtype from the vocabulary alone; ours must agree with it."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dtype = token_dtype(vocab_size)
    ids = np.array([0, 1, vocab_size - 1])
    with IndexedDatasetWriter(tmp_path / "d", dtype) as writer:
        writer.add_document(ids)
    # The rule of megatron.core.datasets.gpt_dataset.GPTDatasetConfig.__post_init__
    code = 4 if vocab_size > np.iinfo(np.uint16).max + 1 else 8
    headerless = megatron.IndexedDataset(str(tmp_path / "d"), sequences_per_dataset=(1, 2), dtype_code=code)
    reader = megatron.IndexedDataset(str(tmp_path / "d"))  # kept: it unmaps the file when it goes, views or not
    np.testing.assert_array_equal(headerless[0], ids)
    np.testing.assert_array_equal(reader[0], ids)


def test_document_at_and_start(dataset: Path) -> None:
    data = IndexedDataset(dataset)
    assert [data.document_start(number) for number in range(5)] == [0, 4, 5, 5, 10]
    assert [data.document_at(token) for token in (0, 3, 4, 5, 9)] == [0, 0, 1, 3, 3]
    assert data.read(3, 3).tolist() == [1, 65_499, 2]
    assert data.validate() == 65_499


def test_append_dataset(tmp_path: Path, dataset: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "twice", np.dtype("<u2")) as writer:
        writer.append_dataset(dataset)
        writer.add_document([11])
        writer.append_dataset(dataset)
    data = IndexedDataset(tmp_path / "twice")
    data.validate()
    expected = [tokens_of(sequences) for sequences in DOCUMENTS]
    assert [data.document(number).tolist() for number in range(9)] == [*expected, [11], *expected]
    with pytest.raises(InputError, match="int32"), IndexedDatasetWriter(tmp_path / "x", np.dtype("<i4")) as writer:
        writer.append_dataset(dataset)
    assert not list(tmp_path.glob("x*"))  # an error leaves nothing behind


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".idx", lambda data: data[:-3], "truncated"),
        (".idx", lambda data: data[:20], "not the index"),
        (".idx", lambda data: b"garbage" * 30, "not the index"),
        (".idx", lambda data: b"", "not the index"),
        (".idx", lambda data: data[:9] + b"\x02" + data[10:], "version 2"),
        (".idx", lambda data: data[:17] + b"\x63" + data[18:], "dtype code 99"),
        (".idx", lambda data: data[:-8] + b"\x05" + bytes(7), "span sequences 0 to 5"),
        (".bin", lambda data: data[:-1], "19 bytes, but its index needs 20"),
        (".bin", lambda data: data + b"x", "21 bytes"),
        (".bin", lambda data: b"", "0 bytes"),
    ],
)
def test_damaged_files_are_refused(dataset: Path, suffix: str, damage, message: str) -> None:
    path = Path(f"{dataset}{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        IndexedDataset(dataset)
    assert str(path) in str(error.value)


def test_missing_file_is_refused(dataset: Path) -> None:
    Path(f"{dataset}.bin").unlink()
    with pytest.raises(InputError, match=r"d\.bin: no such file"):
        IndexedDataset(dataset)


def test_validate_finds_wrong_offsets(dataset: Path) -> None:
    path = Path(f"{dataset}.idx")
    data = bytearray(path.read_bytes())
    data[34 + 6 * 4 + 8] += 2  # the byte offset of sequence 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="sequence 1 should start at byte 6"):
        IndexedDataset(dataset).validate()


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="received 1 to 65536"),
        IndexedDatasetWriter(tmp_path / "d", np.dtype("<u2")) as writer,
    ):
        writer.add_document([1, 65_536])
    assert not list(tmp_path.iterdir())
