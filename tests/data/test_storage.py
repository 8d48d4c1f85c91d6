"""Texts in object storage: the same documents, and the same dataset, as from local files."""

import gzip
import json
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from upath import UPath

from nemo_llm.corpus.documents import expand_inputs
from nemo_llm.corpus.shards import TextFormat, cut_inputs, read_shard
from nemo_llm.data.index.build import build_index
from nemo_llm.errors import InputError
from tests.data.test_index import job, run_tool, write_jsonl

LINES = TextFormat("text", "line", "utf-8")


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, UPath]:
    """Every format in a local folder, and the same below ``memory://``."""
    local, remote = tmp_path / "corpus", UPath(f"memory://{tmp_path.name}")
    local.mkdir()
    rows = [{"text": f"Document {number}, of the whale."} for number in range(40_000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (local / "a.jsonl").write_bytes(lines)  # more than a megabyte: several shards
    (local / "b.jsonl.gz").write_bytes(gzip.compress(lines[:3000].rpartition(b"\n")[0]))
    (local / "c.jsonl.zst").write_bytes(zstandard.compress(lines[:2000].rpartition(b"\n")[0]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:50]), local / "d.parquet")
    (local / "e.txt").write_text("one\n\ntwo\n")
    (local / "f.jsonl").write_text('{"text": "good"}\nbroken\n')
    for path in local.iterdir():
        (remote / "deep" / path.name).write_bytes(path.read_bytes())
    return local, remote


def found(place: str) -> list[str]:
    inputs = cut_inputs([place], LINES)
    records = [record for shard in inputs.shards for record in read_shard(shard, LINES)]
    return [getattr(record, "text", None) or f"line {record.line}: {record.detail}" for record in records]


def test_the_documents_are_those_of_local_files(corpus: tuple[Path, UPath]) -> None:
    local, remote = corpus
    expected = found(str(local))
    assert len(expected) > 40_000
    assert expected[-1].startswith("line 2: Expecting value")
    assert len(cut_inputs([str(remote)], LINES).shards) == len(cut_inputs([str(local)], LINES).shards) > 6
    assert found(str(remote)) == found(f"{remote}/**/*") == expected
    assert found(f"{remote}/deep/[ab].jsonl") == expected[:40_000]


def test_a_dataset_is_byte_for_byte_the_same(corpus: tuple[Path, UPath], tmp_path: Path) -> None:
    local, remote = corpus
    for name, place in (("local", local), ("remote", remote)):
        build_index(job([place], tmp_path / name / "data", workers=0))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"local/data.{kind}").read_bytes() == (tmp_path / f"remote/data.{kind}").read_bytes()


def test_a_url_goes_through_the_command_and_its_workers(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["Call me Ishmael."] * 9)
    done = run_tool(
        f"input=file://{tmp_path}/*.jsonl", f"output_prefix={tmp_path}/out/data", "tokenizer=byte", "workers=2"
    )
    assert done.returncode == 0, done.stderr
    assert "file://" in (tmp_path / "out/data.manifest.json").read_text()


def test_a_change_while_reading_is_noticed(corpus: tuple[Path, UPath]) -> None:
    inputs = cut_inputs([str(corpus[1])], LINES)
    inputs.check_unchanged("indexed")
    time.sleep(0.01)
    (corpus[1] / "deep/e.txt").write_bytes(b"another length")
    with pytest.raises(InputError, match=r"e\.txt: changed while it was indexed"):
        inputs.check_unchanged("indexed")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nowhere/at/all", "no such file"),
        ("memory://nowhere/*.jsonl", "no file matches"),
        ("nonsense://bucket/a.jsonl", "nonsense"),
    ],
)
def test_what_is_not_there_is_said(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        expand_inputs(url)
