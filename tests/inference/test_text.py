"""Text that comes token by token is the text decoded at once; stop strings end it; prompts and chat templates."""

from pathlib import Path

import pytest

from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.conversation.prompts import load_chat_prompts, read_prompts
from nemo_llm.conversation.template import ChatTemplate
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.errors import InputError
from nemo_llm.inference.decoder import check_prompts
from nemo_llm.inference.detokenize import TextStream
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer

TEXT = "The whale — 🐋 — breached; naïve café, 日本語 text. Stop here, stop there."


def tokenizer(kind: str) -> Tokenizer:
    common = {"eod_token": None, "bos_token": None, "parse_special_tokens": False, "tiktoken_pattern": None}
    path = {"byte": None, "huggingface": "asset:demo", "gpt2_bpe": "asset:gpt2"}[kind]
    return load_tokenizer(
        TokenizerConfig(name=kind, type=kind, path=path, nemo_class=None, nemo_args={}, **common)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["byte", "huggingface", "gpt2_bpe"])
def test_pieces_make_the_whole_text(kind: str) -> None:
    tok = tokenizer(kind)
    stream = TextStream(tok, tok.encode("Before it."), [])
    pieces = []
    for token in tok.encode(TEXT):
        stream.add(token)
        pieces.append(stream.news())
    stream.finish()
    pieces.append(stream.news(final=True))
    assert stream.text == "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte", "gpt2_bpe"])
def test_a_stop_string_ends_the_text_and_is_never_shown(kind: str) -> None:
    tok = tokenizer(kind)
    stream = TextStream(tok, [], ["nowhere", "Stop here"])
    shown = ""
    for token in tok.encode(TEXT):
        stream.add(token)
        shown += stream.news()
        if stream.stopped:
            break
    stream.finish()
    assert shown + stream.news(final=True) == stream.text == TEXT[: TEXT.index("Stop here")]


def test_what_only_began_like_a_stop_string_is_shown_at_the_end() -> None:
    tok = tokenizer("byte")
    stream = TextStream(tok, [], ["Stopped"])
    for token in tok.encode("It will Stop"):
        stream.add(token)
    assert stream.news() == "It will "
    stream.finish()
    assert stream.news(final=True) == "Stop"


def test_an_incomplete_character_at_the_end_is_text() -> None:
    tok = tokenizer("byte")
    stream = TextStream(tok, [], [])
    for token in list("é".encode())[:1]:
        stream.add(token)
    assert stream.news() == ""
    stream.finish()
    assert stream.text == "\ufffd"


def test_too_long_and_empty_prompts_are_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)prompt 2 has 90 tokens.*window of 100.*max_new_tokens=10 or less"):
        check_prompts([[1], [1] * 90], 20, 100)
    with pytest.raises(InputError, match="shorten the prompt"):
        check_prompts([[1] * 200], 20, 100)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        check_prompts([[]], 20, 100)


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("One\n\nTwo words\n")
    assert read_prompts(str(lines)) == ["One", "Two words"]
    records = tmp_path / "a.jsonl"
    records.write_text('{"text": "One\\nline"}\n')
    assert read_prompts(str(records)) == ["One\nline"]
    records.write_text('{"text": "One"}\n{"txt": "Two"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_prompts(str(records))
    with pytest.raises(InputError, match="no such file"):
        read_prompts(str(tmp_path / "missing"))


def test_chat_template_errors_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2: no Jinja template"):
        ChatTemplate("a\n{% for %}", "mine.jinja", {})
    for source, words in (
        ("a\n\n{{ nothing.here }}", r"mine\.jinja, line 3.*nothing"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "line 1.*zero"),
        ("{{ messages + 1 }}", "line 1"),
        ("{{ 'x' * 10 ** 18 }}", "line 1"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ):
        with pytest.raises(InputError, match=words):
            ChatTemplate(source, "mine.jinja", {}).render([])
    with pytest.raises(InputError, match="brought no chat template"):
        load_chat_prompts(tokenizer("gpt2_bpe"), None)
    with pytest.raises(InputError, match=r"chat_template = 'chatlm'(?s:.*)did you mean chatml"):
        load_chat_prompts(tokenizer("gpt2_bpe"), "chatlm")


def test_special_tokens_are_read_only_where_asked() -> None:
    tok = tokenizer("gpt2_bpe")
    assert TemplateEncoder(tok).encode("a<|endoftext|>") == [*tok.encode("a"), tok.eod_id]
    assert tok.eod_id not in tok.encode("a<|endoftext|>")
