"""Chat templates against transformers, checks of what they write, and its ids with every kind of tokenizer."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from nemo_llm.config.commands.data import compose_tool
from nemo_llm.config.commands.generate import GenerateConfig
from nemo_llm.conversation.masks import ChatEncoder
from nemo_llm.conversation.messages import ChatRecord
from nemo_llm.conversation.prompts import ChatHistory, load_chat_prompts
from nemo_llm.conversation.template import ChatTemplate, fixed_day, load_template, save_template, saved_source
from nemo_llm.conversation.template_checks import answer_end, content_form, control_text_problems
from nemo_llm.conversation.template_tokens import TemplateEncoder
from nemo_llm.conversation.turn_end import turn_end_ids
from nemo_llm.errors import ConfigError, InputError
from nemo_llm.inference.decoder import stop_ids
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_from_folder
from tests.data.conftest import CHAT, tokenizer_config
from tests.data.test_tokenizer import gpt2_ranks, sentencepiece_model

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "n": 1}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says <how> it is & will be in été.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    },
}
HI = {"role": "user", "content": "Hi"}
CALLING: list[dict] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "18 C"},
    {"role": "assistant", "content": "18."},
]
TEXT_CALL = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CONVERSATIONS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "question": ([HI], None),
    "system": ([{"role": "system", "content": "Be brief."}, HI, {"role": "assistant", "content": "Hello."}], None),
    "turns": ([HI, {"role": "assistant", "content": "b"}, HI, {"role": "assistant", "content": "d"}], None),
    "empty system": ([{"role": "system", "content": ""}, HI], None),
    "tools": (CALLING, [TOOL]),
    "arguments as text": ([CALLING[0], {**CALLING[1], "tool_calls": [TEXT_CALL]}, *CALLING[2:]], [TOOL]),
    "reasoning": ([HI, {"role": "assistant", "reasoning_content": "two and two", "content": "4"}, HI], None),
    "thinking": ([HI, {"role": "assistant", "thinking": "x", "content": "<think>\ny\n</think>\n\n5"}], None),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
    "no content": ([HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [TOOL]),
    "wrong order": ([{"role": "assistant", "content": "x"}, {"role": "user"}], None),
}


def published() -> list[Path]:
    """Templates of published models, as trl ships them."""
    trl = pytest.importorskip("trl")
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def test_texts_and_refusals_are_those_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    templates, refused, compared = published(), 0, 0
    assert len(templates) > 60
    for path in templates:
        source = path.read_text()
        template = ChatTemplate(source, path.name, SPECIAL)
        for name, (messages, tools) in CONVERSATIONS.items():
            settings = {"tools": tools, "add_generation_prompt": len(name) % 2 == 0}
            try:
                expected = render_jinja_template([messages], chat_template=source, **settings, **SPECIAL)[0][0]
            except Exception:  # whatever Python raises inside a template
                refused += 1
                with pytest.raises(InputError, match=path.name):
                    template.render(messages, **settings)
                continue
            assert template.render(messages, **settings) == expected, (path.name, name)
            compared += 1
    assert compared > 500
    assert refused > 50


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ nothing }}|{{ messages[0].nothing }}|{{ tools }}|{{ documents is none }}", "||None|True"),
        ("{% generation %}a{% endgeneration %}{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}"
         "{% endfor %}", "a1"),
        ("{{ {'a': '<é>'} | tojson }}{{ [1] | tojson(indent=1) }}", '{"a": "<é>"}[\n 1\n]'),
        ("{% set space = namespace(n=1) %}{% set space.n = 2 %}{{ space.n }}{{ dict(a=1).a }}", "21"),
        ("{{ strftime_now('%Y') == now }}", "True"),
    ],
)  # fmt: skip
def test_what_templates_may_use(source: str, text: str) -> None:
    template = ChatTemplate(source, "mine", {"now": datetime.now().strftime("%Y")})
    assert template.render([HI]) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set space = namespace() %}{% set space.__init__ = 1 %}",
        "{{ namespace(_hidden=1) }}",
    ],
)
def test_templates_cannot_leave_their_sandbox(source: str) -> None:
    try:
        text = ChatTemplate(source, "mine", {}).render([HI])
    except InputError as error:
        text = "" if "refuses the conversation" in str(error) else str(error)
    assert text == ""  # names that the sandbox hides are empty


def test_halves_of_characters_are_refused_and_cannot_forge_an_end() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "mine", {})
    for half in ("\ud83d", "\ud800", "\ud801"):
        with pytest.raises(InputError, match=r"message 0, content.*lone surrogate at character 1"):
            template.render([{"role": "user", "content": f"x{half}"}])


TOKENIZERS = ("demo", "gpt2_bpe", "byte", "tiktoken", "sentencepiece")


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    changes: dict = {
        "demo": {},
        "gpt2_bpe": {"type": "gpt2_bpe", "path": "asset:gpt2"},
        "byte": {"type": "byte", "path": None},
        "tiktoken": {"type": "tiktoken", "tiktoken_pattern": "r50k_base"},
        "sentencepiece": {"type": "sentencepiece"},
    }[request.param]
    if request.param == "tiktoken":
        changes["path"] = str(gpt2_ranks(tmp_path))
    if request.param == "sentencepiece":
        changes["path"] = str(sentencepiece_model(tmp_path))
    return load_tokenizer(tokenizer_config(**changes))


@pytest.mark.parametrize("name", ["plain", "alpaca"])
def test_the_end_of_an_answer_is_learned_as_its_id(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(CHAT, template=name)
    encoder = ChatEncoder(config, tokenizer)
    turn = [HI, {"role": "assistant", "content": "Hello."}]
    chat = encoder.encode(ChatRecord([*turn, *turn]))
    learned = [token for token, is_learned in zip(chat.tokens, chat.learned, strict=True) if is_learned]
    assert learned.count(tokenizer.eod_id) == chat.tokens.count(tokenizer.eod_id) == 2
    runs = [list(run) for is_end, run in groupby(learned, key=lambda token: token == tokenizer.eod_id) if not is_end]
    assert [text for run in runs if (text := tokenizer.decode(run).strip())] == ["Hello.", "Hello."]
    assert not list(control_text_problems(encoder.template, encoder.tokens))
    # The template that a checkpoint keeps gives the same ids, where nothing but the tokenizer is known.
    tokenizer.save(tmp_path / "saved")
    save_template(saved_source(encoder.template, encoder.tokens), tmp_path / "saved")
    again = load_template(None, TemplateEncoder(load_tokenizer_from_folder(tmp_path / "saved")), "chat_template")
    assert encoder.tokens.encode(again.render([*turn, *turn])) == encoder.tokens.encode(
        encoder.template.render([*turn, *turn])
    )
    # ... and transformers the same text, where the end of a document has a name.
    if encoder.tokens.eod_name is not None:
        alone = ChatTemplate(again.source, "alone", {}).render(turn)
        assert alone == encoder.template.render(turn)


def test_control_text_that_is_no_token_is_named(tokenizer: Tokenizer, demo_tokenizer: Tokenizer) -> None:
    encoder = TemplateEncoder(tokenizer)
    problems = list(control_text_problems(load_template("chatml", encoder, "chat_template"), encoder))
    text = "\n".join(problems)
    assert "chatml writes <|im_start|>, which is no token" in text
    assert "sampling.stop=['<|im_end|>']" in text
    grown = TemplateEncoder(demo_tokenizer)
    grown._backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert not list(control_text_problems(load_template("chatml", grown, "chat_template"), grown))
    silent = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "mine", {})
    assert "writes nothing behind an answer" in next(control_text_problems(silent, encoder))


def test_every_published_template_is_given_words_in_a_form_that_it_writes() -> None:
    forms, silent = {}, set()
    for path in published():
        template = ChatTemplate(path.read_text(), path.name, SPECIAL)
        form = forms[path.stem] = content_form(template)
        for content in ("Wörd", [{"type": "text", "text": "Wörd"}]):
            text = template.render([form.fit({"role": "user", "content": content})])
            assert "Wörd" in text, path.name
            assert "'type'" not in text, path.name
        silent |= {path.stem} if not (answer_end(template) or "").strip() else set()
    assert {(form.as_text, form.as_parts) for form in forms.values()} == {(True, True), (True, False), (False, True)}
    assert silent == {"glm4moe"}  # where the next turn's token ends an answer


def test_a_template_that_writes_todays_date_needs_one(demo_tokenizer: Tokenizer) -> None:
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match=r"today's date.*data\.chat\.date"):
        ChatTemplate(source, "mine", {}, fixed_day(None)).render([HI])
    assert ChatTemplate(source, "mine", {}, fixed_day("2026-11-30")).render([HI]) == "30 Nov 2026Hi"
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        replace(CHAT, date="30.11.2026")


def test_answers_that_the_template_marks_are_learned(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{{ messages | length }}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(replace(CHAT, template=str(path)), demo_tokenizer)
    turns = [HI, {"role": "assistant", "content": "One."}, HI, {"role": "assistant", "content": "Two."}]
    chat = encoder.encode(ChatRecord(turns))
    learned = [token for token, is_learned in zip(chat.tokens, chat.learned, strict=True) if is_learned]
    assert demo_tokenizer.decode(learned) == "One.<|endoftext|>Two.<|endoftext|>"
    trimmed = ChatTemplate(
        "{% for m in messages %}{% set t %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}"
        "{{ t | trim }}{% endfor %}", "mine", {},
    )  # fmt: skip
    assert trimmed.render_with_answers(turns, None, None)[0] != trimmed.render(turns) == "HiOne.HiTwo."
    assert encoder.template.render(turns).startswith("4[user]Hi[assistant]One.<|endoftext|>[user]")


def _templates_beside(folder: Path) -> Iterator[str]:
    import json

    listed = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed, "eos_token": {"content": "E"}}))
    yield "DE"
    for odd in (3, {"default": "X"}, [["default", "X"]], [{"name": "default", "template": None}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": odd}))
        with pytest.raises(ConfigError, match="brought no chat template"):
            load_template(None, TemplateEncoder(load_tokenizer_from_folder(folder)), "chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed, "eos_token": {"content": "E"}}))
    (folder / "chat_template.jinja").write_text("F{{ eos_token }}{{ bos_token is defined }}")
    yield "FEFalse"
    (folder / "special_tokens_map.json").write_text('{"bos_token": "B", "eos_token": "old"}')
    yield "FETrue"


def test_templates_and_special_tokens_beside_a_tokenizer(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    demo_tokenizer.save(tmp_path)
    encoder = TemplateEncoder(load_tokenizer_from_folder(tmp_path))
    for expected in _templates_beside(tmp_path):
        assert load_template("tokenizer", encoder, "chat_template").render([HI]) == expected
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not readable as a JSON object"):
        load_template("tokenizer", encoder, "chat_template")


def test_marks_of_chosen_answers(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}<{{ m.name }}>"
        "{% endgeneration %}not learned{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    def learned(*answers: dict, **changes: str) -> str:
        encoder = ChatEncoder(replace(CHAT, template=str(path), **changes), demo_tokenizer)  # type: ignore[arg-type]
        turns = [turn for answer in answers for turn in (HI, {"role": "assistant", **answer})]
        chat = encoder.encode(ChatRecord(turns))
        return demo_tokenizer.decode([token for token, own in zip(chat.tokens, chat.learned, strict=True) if own])

    one, two = {"name": "a", "content": "One."}, {"name": "b", "content": "Two."}
    assert learned(one, two) == "<a>One.<|endoftext|><b>Two.<|endoftext|>"
    assert learned(one, two, train_on="last_answer") == "<b>Two.<|endoftext|>"
    assert learned(one, {**two, "train": False}) == "<a>One.<|endoftext|>"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(replace(CHAT, template=str(path)), demo_tokenizer)
    turn = [HI, {"role": "assistant", "content": "One."}]
    assert encoder.encode(ChatRecord([*turn, *turn])).unused == ("answers outside {% generation %}",)


def test_what_ends_a_turn(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    demo_tokenizer.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<|im_end|>", "<|eot_id|>", "<turn|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_from_folder(tmp_path)
    end = {name: tokenizer.token_id(name) for name in ("<|im_end|>", "<|eot_id|>", "<turn|>")}
    encoder = TemplateEncoder(tokenizer)
    # No template: the ends of known formats. One that is given: its own alone. Else the one that was saved.
    assert turn_end_ids(tokenizer) == [end["<|im_end|>"], end["<|eot_id|>"]]
    given = ChatTemplate("{% for m in messages %}{{ m.content }}<turn|>\n{% endfor %}", "given", {})
    assert turn_end_ids(tokenizer, given) == [end["<turn|>"]]
    assert turn_end_ids(tokenizer, load_template("llama3", encoder, "chat_template")) == [end["<|eot_id|>"]]
    save_template(given.source, tmp_path)
    assert turn_end_ids(tokenizer) == [end["<turn|>"]]
    sampling = compose_tool("generate", GenerateConfig, ["checkpoint=x", "text=x"]).sampling
    assert stop_ids(tokenizer, sampling) == {tokenizer.eod_id, end["<turn|>"]}
    chatml = load_template("chatml", encoder, "chat_template")
    assert stop_ids(tokenizer, sampling, chatml) == {tokenizer.eod_id, end["<|im_end|>"]}


def test_a_history_forgets_the_oldest_turns_and_keeps_what_does_not_fit_out(demo_tokenizer: Tokenizer) -> None:
    prompts = load_chat_prompts(demo_tokenizer, "plain")
    history = ChatHistory(prompts, window=80, answer_tokens=8, system="Be brief.")
    for number in range(9):
        ids = history.ask(f"Question {number}?")
        assert len(ids) <= 72
        text = demo_tokenizer.decode(ids)
        assert text.startswith("system: Be brief.")
        assert text.endswith(f"user: Question {number}?\nassistant: ")
        history.answer(f"Answer {number}.")
    assert [message["role"] for message in history.messages[:2]] == ["user", "assistant"]
    assert 2 < len(history.messages) < 18
    before = list(history.messages)
    with pytest.raises(InputError, match=r"the message has \d+ tokens.*window of 80"):
        history.ask("word " * 90)
    assert history.messages == before
    history.reset()
    assert not history.messages
