"""Tokenizers: known ids, round trips, saving with checkpoints, and errors that name the key or file."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from nemo_llm.assets import resolve_path
from nemo_llm.checkpoint.saved_run import TOKENIZER_FILE_NAME
from nemo_llm.corpus.documents import read_documents
from nemo_llm.errors import ConfigError, InputError
from nemo_llm.tokenizers.tokenizer import TIKTOKEN_PATTERNS, load_tokenizer, load_tokenizer_from_folder
from tests.data.conftest import tokenizer_config

TEXT = "Hello world, it's <|endoftext|> 123456  \n\n été 日本 🎉 \u200b ok   \n"


def gpt2_ranks(folder: Path) -> Path:
    """GPT-2's merges written as tiktoken ranks, from the shipped files."""
    tiktoken_load = pytest.importorskip("tiktoken.load")
    gpt2 = resolve_path("asset:gpt2", "tokenizers")
    ranks = tiktoken_load.data_gym_to_mergeable_bpe_ranks(str(gpt2 / "vocab.bpe"), str(gpt2 / "encoder.json"))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "gpt2.tiktoken").write_text("".join(lines))
    return folder / "gpt2.tiktoken"


def sentencepiece_model(folder: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    first, *_ = read_documents(resolve_path("asset:shakespeare", "text"), "text")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(first.text.split("\n")), model_prefix=str(folder / "sp"), vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return folder / "sp.model"


@pytest.fixture(params=["huggingface", "gpt2_bpe", "byte", "tiktoken", "sentencepiece"])
def config(request: pytest.FixtureRequest, tmp_path: Path):
    match request.param:
        case "huggingface":
            return tokenizer_config()
        case "gpt2_bpe":
            return tokenizer_config(type="gpt2_bpe", path="asset:gpt2")
        case "byte":
            return tokenizer_config(type="byte", path=None)
        case "tiktoken":
            return tokenizer_config(type="tiktoken", path=str(gpt2_ranks(tmp_path)), tiktoken_pattern="r50k_base")
    return tokenizer_config(type="sentencepiece", path=str(sentencepiece_model(tmp_path)))


def test_round_trip_and_saving(config, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config)
    ids = tokenizer.encode(TEXT)
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.eod_id not in ids  # its name in raw text is text
    if config.type != "sentencepiece":  # which normalises spaces
        assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_batch([TEXT, "a"]) == [ids, tokenizer.encode("a")]

    tokenizer.save(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = load_tokenizer_from_folder(tmp_path / "moved")
    assert again.encode(TEXT) == ids
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab_size, again.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)


def test_gpt2_ids_are_the_published_ones(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_config(type="gpt2_bpe", path="asset:gpt2"))
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)
    ranks = tokenizer_config(type="tiktoken", path=str(gpt2_ranks(tmp_path)), tiktoken_pattern="r50k_base")
    assert load_tokenizer(ranks).encode(TEXT) == tokenizer.encode(TEXT)


def test_special_tokens_in_text_are_parsed_only_when_asked(demo_tokenizer) -> None:
    parsing = load_tokenizer(tokenizer_config(parse_special_tokens=True))
    assert parsing.encode("a<|endoftext|>b").count(parsing.eod_id) == 1
    assert demo_tokenizer.eod_id not in demo_tokenizer.encode("a<|endoftext|>b")
    assert parsing.fingerprint != demo_tokenizer.fingerprint


def test_patterns_are_tiktokens_own() -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public")
    assert public.r50k_pat_str == TIKTOKEN_PATTERNS["r50k_base"]


def test_nemo_tokenizer() -> None:
    pytest.importorskip("nemo.collections.common.tokenizers")
    tokenizer = load_tokenizer(tokenizer_config(type="nemo", path=None, nemo_class="ByteLevelTokenizer"))
    assert tokenizer.decode(tokenizer.encode("Hé")) == "Hé"
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"nemo_class = 'NoSuch'"):
        tokenizer_config(type="nemo", path=None, nemo_class="NoSuch")
    for key in ("trust_remote_code", "chat_template"):
        with pytest.raises(ValueError, match=f"nemo_args.{key}"):
            tokenizer_config(type="nemo", path=None, nemo_class="AutoTokenizer", nemo_args={key: True})


def test_a_nemo_tokenizer_of_a_folder_is_saved_and_read_in_another_place(tmp_path: Path) -> None:
    pytest.importorskip("nemo.collections.common.tokenizers")
    shipped = resolve_path("asset:demo", "tokenizers")
    (tmp_path / "hf").mkdir()
    for file in shipped.iterdir():
        shutil.copyfile(file, tmp_path / "hf" / file.name)
    description = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(description))
    settings = {"pretrained_model_name": str(tmp_path / "hf"), "eos_token": "<|endoftext|>"}
    config = tokenizer_config(type="nemo", path=None, nemo_class="AutoTokenizer", nemo_args=settings)
    tokenizer = load_tokenizer(config)
    tokenizer.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = load_tokenizer_from_folder(tmp_path / "moved")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("outside", ["/etc/passwd", "../secret", "link"])
def test_a_saved_tokenizer_names_nothing_outside_of_its_folder(tmp_path: Path, outside: str) -> None:
    load_tokenizer(tokenizer_config()).save(tmp_path / "saved")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "saved" / "link").symlink_to(tmp_path / "secret")
    file = tmp_path / "saved" / TOKENIZER_FILE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "path": outside}))
    with pytest.raises(InputError, match="does not lie in the folder"):
        load_tokenizer_from_folder(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "asset:none"}, InputError, r"asset:none: no such tokenizers asset\. Shipped are: demo, gpt2"),
        ({"path": "/nowhere/tokenizer.json"}, InputError, "/nowhere/tokenizer.json: no such tokenizer file"),
        ({"eod_token": "<eot>"}, ConfigError, r"data\.tokenizer\.eod_token = '<eot>'"),
        ({"type": "sentencepiece", "path": __file__}, InputError, "not a SentencePiece model"),
        ({"path": __file__}, InputError, r"not a Hugging Face tokenizer\.json"),
    ],
)
def test_errors_name_key_or_file(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_tokenizer(tokenizer_config(**changes))


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer_from_folder(tmp_path)
    (tmp_path / "nemo_llm_tokenizer.json").write_text('{"name": 1}')
    with pytest.raises(InputError, match="damaged tokenizer description"):
        load_tokenizer_from_folder(tmp_path)
