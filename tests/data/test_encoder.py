"""Encoders: the fast path and cutting long documents give exactly the tokenizer's own ids."""

import json
import random
import time
from itertools import islice
from pathlib import Path

import pytest

from nemo_llm.assets import resolve_path
from nemo_llm.corpus.documents import read_documents
from nemo_llm.tokenizers.document_encoder import DocumentEncoder, build_encoder
from nemo_llm.tokenizers.tiktoken_encoder import FastBpe, NotProvenError, _check_merges, _read_spec, build_fast_bpe
from nemo_llm.tokenizers.tokenizer import load_tokenizer
from tests.data.conftest import tokenizer_config
from tests.data.test_tokenizer import config  # noqa: F401 - one tokenizer of each kind

TEXTS = ["", "a", "Hello  world\n\n\nit's 12345\t été 日本 🎉\n", "<|endoftext|> is text", "x" * 300, " \n \n "]


@pytest.fixture(scope="module")
def long_text() -> str:
    prose = "".join(d.text for d in islice(read_documents(resolve_path("asset:moby_dick", "text"), "text"), 3))
    choose = random.Random(1)
    noise = "".join(choose.choices("ab1 .\n\té日🎉'", k=3000))
    return (
        prose[:20_000] + noise + "日本語テキスト" * 800 + "Zm9v+/9" * 700 + "a" * 9000 + "  \n\n" * 200 + prose[:9000]
    )


def test_cut_documents_have_the_ids_of_whole_ones(config, long_text: str, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(config)
    encoder = DocumentEncoder(tokenizer, None, "test", chunk_characters=1000)
    assert encoder.space_goes_right is not None
    expected = tokenizer.encode(long_text)
    assert encoder.encode([long_text])[0].tolist() == expected
    blocks = [long_text[start : start + 777] for start in range(0, len(long_text), 777)]
    pieces = list(encoder.encode_blocks(blocks))
    assert len(pieces) > 20  # it was cut
    assert [number for piece in pieces for number in piece.tolist()] == expected
    assert [ids.tolist() for ids in encoder.encode(TEXTS)] == tokenizer.encode_batch(TEXTS)


def test_fast_path_gives_the_same_ids(demo_tokenizer, long_text: str, proof_cache: Path) -> None:
    encoder = build_encoder(demo_tokenizer, proof_cache)
    assert encoder.way == "tiktoken, proven to give the same ids"
    texts = [*TEXTS, long_text, *long_text.split("\n")]
    assert [ids.tolist() for ids in encoder.encode(texts)] == demo_tokenizer.encode_batch(texts)
    began = time.monotonic()
    build_encoder(demo_tokenizer, proof_cache)
    assert time.monotonic() - began < 1  # the proof is kept


def test_fast_path_steps_aside_for_added_tokens_in_the_text() -> None:
    pytest.importorskip("tiktoken")
    parsing = load_tokenizer(tokenizer_config(parse_special_tokens=True))
    fast = FastBpe(_read_spec(parsing), different="")
    assert fast.encode("a<|endoftext|>b") is None
    encoder = DocumentEncoder(parsing, fast, "test")
    assert [ids.tolist() for ids in encoder.encode(["a<|endoftext|>b", "ab"])] == [
        parsing.encode("a<|endoftext|>b"),
        parsing.encode("ab"),
    ]


def changed_tokenizer(folder: Path, change) -> Path:
    description = json.loads((resolve_path("asset:demo", "tokenizers") / "tokenizer.json").read_text())
    change(description)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalised by Lowercase"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "space is put before"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "not byte-level"),
        (lambda d: d["model"].update(dropout=0.1), "not a plain BPE model"),
    ],
)
def test_other_tokenizers_take_the_ordinary_path(change, reason: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_config(path=str(changed_tokenizer(tmp_path, change))))
    with pytest.raises(NotProvenError, match=reason):
        build_fast_bpe(tokenizer, tmp_path)
    encoder = build_encoder(tokenizer, tmp_path)
    assert encoder.way.startswith("ordinary: ")
    assert reason in encoder.way


def test_merges_that_ranks_would_do_otherwise_are_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_config())
    spec = _read_spec(tokenizer)
    _check_merges(spec)
    place = next(n for n, (left, right) in enumerate(spec.merges) if len(left) == 2 and len(right) == 1)
    left, right = spec.merges[place]
    spec.merges[place] = (left[:1], left[1:] + right)
    with pytest.raises(NotProvenError, match="comes about in another way"):
        _check_merges(spec)


def test_an_endless_word_takes_linear_time(demo_tokenizer) -> None:
    encoder = DocumentEncoder(demo_tokenizer, None, "test", chunk_characters=1000)
    seconds = []
    for size in (100_000, 400_000):
        word = "".join(random.Random(2).choices("abcdefgh", k=size))
        began = time.process_time()
        (ids,) = encoder.encode([word])
        seconds.append(time.process_time() - began)
        assert demo_tokenizer.decode(ids.tolist()) == word
    assert seconds[1] < 12 * seconds[0] + 0.2  # quadratic would be 16 times
