"""``tools/inspect_dataset.py`` and ``tools/train_tokenizer.py`` as a user runs them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from nemo_llm.assets import resolve_path
from nemo_llm.corpus.documents import read_documents
from nemo_llm.data.index.build import build_index
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder
from tests.data.test_index import job

ROOT = Path(__file__).resolve().parents[2]
SHAKESPEARE = resolve_path("asset:shakespeare", "text")


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool("inspect_dataset")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    build_index(job([SHAKESPEARE], tmp_path / "d"))
    return str(tmp_path / "d")


def test_validate_counts_histogram_checksum(tool, prefix: str, capsys) -> None:
    assert tool.main(["validate", prefix]) == 0
    assert "136 documents" in capsys.readouterr().out
    assert tool.main(["counts", prefix]) == 0
    assert f"{IndexedDataset(prefix).num_tokens:,}" in capsys.readouterr().out
    assert tool.main(["histogram", prefix]) == 0
    out = capsys.readouterr().out
    lengths = IndexedDataset(prefix).sequence_lengths
    assert f"median {int(np.median(lengths)):,}" in out
    assert f"mean {lengths.mean():,.1f}" in out
    assert sum(int(line.split()[1].replace(",", "")) for line in out.splitlines() if "#" in line) == 136
    assert tool.main(["checksum", prefix]) == 0


def test_damage_is_found_and_named(tool, prefix: str, capsys) -> None:
    tokens = Path(f"{prefix}.bin")
    data = bytearray(tokens.read_bytes())
    data[1001] = 255  # an id of 65,280 or more
    tokens.write_bytes(data)
    assert tool.main(["checksum", prefix]) == 2
    assert "d.bin: SHA-256" in capsys.readouterr().err
    assert tool.main(["validate", prefix]) == 2
    assert "document 0 holds token id 65" in capsys.readouterr().err
    tokens.write_bytes(data[:-4])
    assert tool.main(["validate", prefix]) == 2
    assert "truncated or belongs to another dataset" in capsys.readouterr().err
    assert tool.main(["counts", "/nowhere"]) == 2
    assert "/nowhere.idx: no such file" in capsys.readouterr().err


def test_decode_gives_the_text_back(tool, prefix: str, capsys) -> None:
    texts = [document.text for document in read_documents(SHAKESPEARE, "text")]
    assert tool.main(["decode", prefix, "--documents", "2,5:7"]) == 0
    out = capsys.readouterr().out
    for number in (2, 5, 6):
        assert f"--- document {number}\n{texts[number]}<|endoftext|>" in out
    assert tool.main(["decode", prefix, "--documents", "136"]) == 2
    assert "documents 0 to 135" in capsys.readouterr().err
    assert tool.main(["decode", prefix, "--documents", "0", "--tokenizer", "byte"]) == 2
    assert "beyond the tokenizer's 257" in capsys.readouterr().err


def test_split_and_merge_give_the_dataset_back(tool, prefix: str, tmp_path: Path, capsys) -> None:
    parts = [str(tmp_path / name) for name in "abc"]
    assert tool.main(["split", prefix, "--shares", "50,40,10", "--outputs", *parts]) == 0
    assert [IndexedDataset(part).num_documents for part in parts] == [68, 54, 14]
    assert tool.main(["merge", *parts, "--output", str(tmp_path / "m")]) == 0
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/m{suffix}").read_bytes() == Path(f"{prefix}{suffix}").read_bytes()
    assert tool.main(["checksum", *parts, str(tmp_path / "m")]) == 0
    assert tool.main(["merge", *parts, "--output", str(tmp_path / "m")]) == 2
    assert "exists" in capsys.readouterr().err
    manifest = json.loads(Path(f"{parts[0]}.manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "other"
    Path(f"{parts[0]}.manifest.json").write_text(json.dumps(manifest))
    assert tool.main(["merge", *parts, "--output", str(tmp_path / "n")]) == 2
    assert "different tokenizers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "library"), [("bpe", "tokenizers"), ("unigram", "tokenizers"), ("bpe", "sentencepiece"),
                          ("unigram", "sentencepiece"), ("byte", "tokenizers")]
)  # fmt: skip
def test_train_tokenizer(kind: str, library: str, tmp_path: Path, capsys) -> None:
    trainer = load_tool("train_tokenizer")
    (tmp_path / "es.txt").write_text("El niño comió una manzana en la montaña. ¿Qué pasó después? Nada.\n" * 40)
    arguments = [
        f"input={{plays: 'asset:shakespeare', spanish: {tmp_path}/es.txt}}",
        f"output={tmp_path}/t", f"type={kind}", f"library={library}", "vocab_size=700", "sample_characters=60000",
        "special_tokens=['<|fim_prefix|>']",
    ]  # fmt: skip
    assert trainer.main(arguments) == 0, capsys.readouterr().err
    tokenizer = load_tokenizer_from_folder(tmp_path / "t")
    text = "El niño said: what, no man at door?\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.vocab_size == (257 if kind == "byte" else 700)
    figures = json.loads((tmp_path / "t" / "report.json").read_text())
    plays = figures["sources"]["plays"]
    assert plays["round_trip"] == 1
    assert plays["bytes_per_token"] == 1 if kind == "byte" else plays["bytes_per_token"] > 1.8
    assert plays["tokens_per_word"] == pytest.approx(
        plays["tokens"] / sum(len(t.split()) for t in held_out_plays(60_000)), rel=1e-9
    )
    if kind != "byte":
        assert tokenizer.token_id("<|fim_prefix|>") is not None
    assert trainer.main(arguments) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err


def held_out_plays(characters: int) -> list[str]:
    """Each twentieth of the first documents, as the tool holds them out of one shard."""
    texts, left = [], characters
    for document in read_documents(SHAKESPEARE, "text"):
        if left <= 0:
            break
        texts.append(document.text[:left])
        left -= len(texts[-1])
    return texts[19::20] or texts[:1]
