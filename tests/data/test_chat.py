"""Conversations as data: forms of records, templates, which tokens are learned, packing, errors."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nemo_llm.config.sections.data import BlendSource, DataConfig
from nemo_llm.conversation.masks import ChatEncoder
from nemo_llm.conversation.messages import BadChatError, ChatRecord, to_conversation
from nemo_llm.conversation.template import NAMED_TEMPLATES
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.sources.chats import open_chats
from nemo_llm.errors import ConfigError, InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_from_folder
from tests.data.conftest import CHAT, tokenizer_config

TWO_TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No, not two."},
]


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def chat_config(data_config: Callable[..., DataConfig], path: str, **changes: object) -> DataConfig:
    keys: dict = {"blend": (BlendSource(name="c", chat=path),), "split": None, "packing": "none", "seq_length": 256}
    return data_config(**(keys | changes))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]},
        {"conversations": [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "c"}]},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a\n\nb", "completion": "c"},
        {
            "prompt": [{"role": "user", "content": "a\n\nb"}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
    ],
    ids=["messages", "sharegpt", "alpaca", "prompt", "prompt as messages"],
)
def test_every_form_gives_the_same_conversation(record: dict) -> None:
    chat = to_conversation(record, CHAT)
    assert [(m["role"], m["content"]) for m in chat.messages] == [("user", "a\n\nb"), ("assistant", "c")]


def test_two_named_fields_and_a_system_prompt() -> None:
    config = replace(CHAT, prompt_key="question", answer_key="answer", system_prompt="Be short.")
    chat = to_conversation({"question": "q", "answer": "a", "id": 3}, config)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.unused == ("id",)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a"}, ["messages", "prompt_key", "text"]),
        ({"messages": []}, ["messages", "list"]),
        ({"messages": [{"role": "user"}]}, ["content", "user"]),
        ({"messages": [{"role": "bot", "content": "a"}]}, ["bot", "assistant"]),
        ({"messages": TWO_TURNS[1:]}, ["message 0", "assistant", "user"]),
        ({"messages": TWO_TURNS[:3]}, ["last message", "assistant"]),
        ({"messages": [TWO_TURNS[0], TWO_TURNS[0]]}, ["message 1", "user", "assistant"]),
        ({"conversations": [{"from": "alien", "value": "a"}]}, ["alien", "human"]),
        ({"instruction": "a"}, ["output"]),
        ({"prompt": 3, "completion": "a"}, ["prompt", "int"]),
    ],
)
def test_malformed_records_say_what_is_wrong(record: dict, words: list[str]) -> None:
    with pytest.raises(BadChatError) as caught:
        to_conversation(record, CHAT)
    for word in words:
        assert word in str(caught.value)


def test_errors_name_file_and_line(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(InputError, match=r"c\.jsonl:2: no field 'completion'"):
        build_train_and_validation(chat_config(data_config, path), demo_tokenizer, 1)


def encoder(config: DataConfig, tokenizer: Tokenizer) -> ChatEncoder:
    return ChatEncoder(config.chat, tokenizer)


def learned_text(config: DataConfig, tokenizer: Tokenizer, messages: list[dict]) -> str:
    chat = encoder(config, tokenizer).encode(ChatRecord(messages))
    return tokenizer.decode([token for token, learned in zip(chat.tokens, chat.learned, strict=True) if learned])


@pytest.mark.parametrize("kind", ["demo", "byte"])
def test_only_answers_are_learned(kind: str, data_config) -> None:
    changes = {} if kind == "demo" else {"name": "byte", "type": "byte", "path": None}
    tokenizer = load_tokenizer(tokenizer_config(**changes))
    config = data_config(tokenizer=tokenizer_config(**changes), seq_length=512)
    both = "Yes, one.<|im_end|>\nNo, not two.<|im_end|>\n"
    assert learned_text(config, tokenizer, TWO_TURNS) == both
    last = replace(config, chat=replace(CHAT, train_on="last_answer"))
    assert learned_text(last, tokenizer, TWO_TURNS) == "No, not two.<|im_end|>\n"
    chosen = [TWO_TURNS[0], TWO_TURNS[1] | {"train": True}, TWO_TURNS[2], TWO_TURNS[3] | {"train": False}]
    assert learned_text(config, tokenizer, chosen) == "Yes, one.<|im_end|>\n"
    everything = replace(config, chat=replace(CHAT, train_on="all"))
    assert "<|im_start|>user\nOne?" in learned_text(everything, tokenizer, TWO_TURNS)


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_named_templates_round_trip_and_render_as_transformers_does(
    name: str, data_config, demo_tokenizer: Tokenizer
) -> None:
    config = data_config(chat=replace(CHAT, template=name), seq_length=512)
    learned = learned_text(config, demo_tokenizer, TWO_TURNS)
    assert "No, not two." in learned
    assert "One?" not in learned
    theirs = PreTrainedTokenizerFast(tokenizer_object=demo_tokenizer.backend)  # type: ignore[attr-defined]
    template = encoder(config, demo_tokenizer).template
    expected = theirs.apply_chat_template(
        TWO_TURNS, chat_template=template.source, tokenize=False, eod_token=template.variables["eod_token"]
    )
    assert template.render(TWO_TURNS) == expected


def test_a_template_that_rewrites_the_past_is_refused(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = data_config(chat=replace(CHAT, template=str(path)))
    with pytest.raises(BadChatError, match="does not round-trip"):
        encoder(config, demo_tokenizer).encode(ChatRecord(TWO_TURNS))


def test_an_unknown_template_names_the_nearest(data_config, demo_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="did you mean chatml"):
        encoder(data_config(chat=replace(CHAT, template="chatm")), demo_tokenizer)
    with pytest.raises(ConfigError, match="no chat template beside"):
        encoder(data_config(chat=replace(CHAT, template="tokenizer")), demo_tokenizer)


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_long_conversations(policy: str, data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b " * 200}]
    path = write_lines(tmp_path / "c.jsonl", records)
    config = chat_config(data_config, path, seq_length=64, chat=replace(CHAT, too_long=policy))
    if policy == "error":
        with pytest.raises(InputError, match=r"c\.jsonl:2: \d+ tokens, .*65"):
            build_train_and_validation(config, demo_tokenizer, 1)
        return
    source = build_train_and_validation(config, demo_tokenizer, 1).train.sources[0]
    assert source.num_documents == (1 if policy == "drop" else 2)


def test_packed_conversations_do_not_see_each_other(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"prompt": f"question {n}", "completion": f"answer {n} " * (1 + n % 3)} for n in range(40)]
    path = write_lines(tmp_path / "c.jsonl", records)
    packed = {"packing": "best_fit", "reset_attention_mask": True, "reset_position_ids": True}
    config = chat_config(data_config, path, **packed)
    train = build_train_and_validation(config, demo_tokenizer, 1).train
    alone = build_train_and_validation(chat_config(data_config, path), demo_tokenizer, 1).train
    counts = [sum(float(s[i].loss_mask.sum()) for i in range(s.sources[0].samples_per_epoch)) for s in (train, alone)]
    assert counts[0] == counts[1] > 0
    assert train.sources[0].samples_per_epoch < len(records) / 2
    sample = train[0]
    starts = np.flatnonzero(sample.position_ids == 0)
    assert len(starts) > 2
    assert len(set(sample.document_ids.tolist())) == len(starts)
    assert (sample.loss_mask[starts[1:] - 1] == 0).all()


def test_packing_without_a_document_mask_is_refused(data_config, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="reset_attention_mask"):
        chat_config(data_config, path, packing="best_fit")


def test_replay_of_running_text_beside_conversations(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    blend = (
        BlendSource(name="c", chat=path, weight=0.5),
        BlendSource(name="text", text="asset:shakespeare", weight=0.5),
    )
    config = chat_config(data_config, path, blend=blend, packing="concatenate", reset_attention_mask=True)
    train = build_train_and_validation(config, demo_tokenizer, 1).train
    assert train.counts(64) == [32, 32]
    assert {int(train[i].loss_mask.sum()) == 256 for i in range(64)} == {True, False}


def test_virtual_tokens_stand_before_conversations_and_text(data_config, demo_tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    for blend in ((BlendSource(name="c", chat=path),), (BlendSource(name="t", text="asset:shakespeare"),)):
        config = chat_config(data_config, path, blend=blend)
        sample = build_train_and_validation(config, demo_tokenizer, 1, virtual_tokens=4).train[0]
        assert sample.tokens[:4].tolist() == [-1, -2, -3, -4]
        assert len(sample.tokens) == 257
        assert sample.tokens[4] >= 0
        assert (sample.loss_mask[:3] == 0).all()


def test_parquet_is_read_as_json_lines_are(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    records = [{"messages": TWO_TURNS}] * 2
    path = write_lines(tmp_path / "c.jsonl", records)
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    samples = [
        build_train_and_validation(chat_config(data_config, place), demo_tokenizer, 1).train[0]
        for place in (path, str(tmp_path / "c.parquet"))
    ]
    assert (samples[0].tokens == samples[1].tokens).all()
    assert (samples[0].loss_mask == samples[1].loss_mask).all()


def test_the_tool_shows_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.inspect_dataset import main

    path = write_lines(tmp_path / "c.jsonl", [{"q": "a", "a": "b"}, {"q": "One?", "a": "Yes."}])
    arguments = ["chat", path, "--tokenizer", "demo", "--template", "chatml", "--records", "1", "--fields", "q,a"]
    assert main(arguments) == 0
    assert "One?<|im_end|>\n<|im_start|>assistant\n\033[32mYes.<|im_end|>\n\033[0m" in capsys.readouterr().out


QWEN3 = "qwen3.jinja"
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["city"]}}}


def published(name: str) -> str:
    trl = pytest.importorskip("trl")
    return str(Path(trl.__file__).parent / "chat_templates" / name)


def encode_record(tokenizer: Tokenizer, template: str, record: dict, **changes: object) -> tuple[str, dict[str, int]]:
    """(what is learned of a record, what of it is not used)."""
    made = ChatEncoder(replace(CHAT, template=template, **changes), tokenizer)  # type: ignore[arg-type]
    chat = made.encode_record(record, "here")
    text = tokenizer.decode([token for token, learned in zip(chat.tokens, chat.learned, strict=True) if learned])
    return text, dict(Counter(chat.unused))


def test_calls_reasoning_and_tools_reach_the_template(demo_tokenizer: Tokenizer) -> None:
    calling = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 C"},
            {"role": "assistant", "reasoning_content": "warm", "content": "18."},
        ],
        "tools": [TOOL],
        "id": 7,
    }
    text, unused = encode_record(demo_tokenizer, published(QWEN3), calling, train_on="all")
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>' in text
    assert "<think>\nwarm\n</think>\n\n18." in text
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert unused == {"id of records": 1, "tool_call_id of tool messages": 1}
    as_text, _ = encode_record(
        demo_tokenizer, published(QWEN3), {**calling, "tools": json.dumps([TOOL])}, train_on="all"
    )
    assert as_text == text
    # What no answer stands for is refused; what is written of nothing is counted.
    with pytest.raises(InputError, match=r"here: message 1: .*writes nothing of the answer's tool_calls"):
        encode_record(demo_tokenizer, "chatml", calling)
    calling["messages"][1]["content"] = "I look."  # type: ignore[index]
    _, unused = encode_record(demo_tokenizer, "chatml", calling)
    assert unused == {
        "id of records": 1,
        "tools of records": 1,
        "tool_calls of assistant messages": 1,
        "tool_call_id of tool messages": 1,
        "reasoning_content of assistant messages": 1,
    }


def test_reasoning_that_a_template_leaves_out_of_some_turns_is_counted(demo_tokenizer: Tokenizer) -> None:
    turns = [{**m, "reasoning_content": f"I think {m['content']}"} if n % 2 else m for n, m in enumerate(TWO_TURNS)]
    text, unused = encode_record(demo_tokenizer, published(QWEN3), {"messages": turns}, train_on="all")
    assert "I think No, not two." in text
    assert "I think Yes, one." not in text
    assert unused == {"reasoning_content of assistant messages": 1}


def test_messages_that_a_template_passes_over_are_counted(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.role }}: {{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = {"messages": [{"role": "system", "content": "one"}, *TWO_TURNS]}  # "one" stands in an answer too
    assert encode_record(demo_tokenizer, str(path), record)[1] == {"content of system messages": 1}


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma3.jinja", "smolvlm.jinja", QWEN3])
def test_content_in_parts_is_content(template: str, demo_tokenizer: Tokenizer) -> None:
    name = template if template in NAMED_TEMPLATES else published(template)
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TWO_TURNS[:2]]
    text, unused = encode_record(demo_tokenizer, name, {"messages": parts})
    assert (text, unused) == encode_record(demo_tokenizer, name, {"messages": TWO_TURNS[:2]})
    assert "Yes, one." in text
    assert not unused
    with pytest.raises(InputError, match="part of type 'image'"):
        encode_record(demo_tokenizer, name, {"messages": [{"role": "user", "content": [{"type": "image"}]}]})


@pytest.mark.parametrize(
    ("fields", "learned"),
    [
        ({"weight": 0}, ""),
        ({"weight": 1}, "Yes, one."),
        ({"weight": 0.0}, ""),
        ({"train": False}, ""),
        ({"train": None}, "Yes, one."),
        ({"train": None, "weight": None}, "Yes, one."),
        ({"train": True, "weight": 1}, "Yes, one."),
        ({"weight": 0.5}, "'weight' of a message must be 1 .* received 0.5"),
        ({"weight": True}, "'weight' of a message .* received True"),
        ({"weight": "0"}, "received '0'"),
        ({"train": "false"}, "'train' of a message must be true or false, received 'false'"),
        ({"train": 0}, "'train' .* received 0"),
        ({"train": True, "weight": 0}, "contradict each other"),
    ],
)
def test_which_answers_are_learned(fields: dict, learned: str, demo_tokenizer: Tokenizer) -> None:
    record = {"messages": [TWO_TURNS[0], TWO_TURNS[1] | fields]}
    if len(learned) > len("Yes, one."):
        with pytest.raises(InputError, match=f"here: {learned}|{learned}"):
            encode_record(demo_tokenizer, "chatml", record)
        return
    text, unused = encode_record(demo_tokenizer, "chatml", record)
    assert text.removesuffix("<|im_end|>\n") == learned
    assert not unused
    marked = {"messages": [TWO_TURNS[0] | {"train": False}, TWO_TURNS[1]]}
    assert encode_record(demo_tokenizer, "chatml", marked)[1] == {"train or weight of user messages": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "messages": TWO_TURNS[:2]},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Yes"}]},
        {"system": "Be brief.", "instruction": "One?", "output": "Yes, one."},
    ],
)
def test_a_system_field_is_the_system_message(record: dict, demo_tokenizer: Tokenizer) -> None:
    text, unused = encode_record(demo_tokenizer, "chatml", record, train_on="all", system_prompt="Never seen.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert not unused
    own = {"system": "Other.", "messages": [{"role": "system", "content": "Own."}, *TWO_TURNS[:2]]}
    text, unused = encode_record(demo_tokenizer, "chatml", own, train_on="all")
    assert "Own." in text
    assert unused == {"system of records": 1}


def test_what_is_left_out_is_said_in_words_at_every_start(
    data_config, demo_tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "a", "completion": "b " * 400, "id": 1}
    records = [{"prompt": "a", "completion": "b", "id": 1, "source": "web"}] * 3 + [long] * 2
    config = chat_config(data_config, write_lines(tmp_path / "c.jsonl", records), seq_length=128)
    logger = logging.getLogger("nemo_llm")
    logger.propagate, before = True, logger.propagate
    try:
        for _ in range(2):
            caplog.clear()
            build_train_and_validation(config, demo_tokenizer, 1)
            assert "c.jsonl: of 5 conversations: 2 dropped as too long (data.chat.too_long=drop)" in caplog.text
            assert "c.jsonl: not used: id of records (5), source of records (3)" in caplog.text
            assert "{" not in caplog.text
            assert "chatml writes <|im_end|>, which is no token of the tokenizer demo" in caplog.text
    finally:
        logger.propagate = before
    silent = [{"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"train": False}]}]
    config = chat_config(data_config, write_lines(tmp_path / "d.jsonl", silent))
    with pytest.raises(InputError, match=r"of 1 conversations: 1 without learned tokens \(no answer"):
        build_train_and_validation(config, demo_tokenizer, 1)


def test_parquets_nulls_are_fields_that_are_not_there(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    calls = [
        {"function": {"name": "a", "arguments": {"city": "Paris"}}},
        {"function": {"name": "b", "arguments": {"n": 1}}},
    ]
    records = [
        {"messages": TWO_TURNS, "tools": [TOOL]},
        {"messages": [TWO_TURNS[0], {**TWO_TURNS[1], "train": True, "tool_calls": calls}, *TWO_TURNS[2:]]},
        {"messages": [*TWO_TURNS[:3], {**TWO_TURNS[3], "train": False, "weight": 0}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    lines = write_lines(tmp_path / "c.jsonl", records)
    changes: dict = {"chat": replace(CHAT, template=published("qwen2_5.jinja")), "seq_length": 512}
    stores = [
        open_chats(path, chat_config(data_config, path, **changes), demo_tokenizer, tmp_path / "cache", 0)
        for path in (lines, str(tmp_path / "c.parquet"))
    ]
    for start in range(stores[0].num_documents):
        assert stores[0].document_start(start) == stores[1].document_start(start)
    count = stores[0].num_tokens
    assert (stores[0].read(0, count) == stores[1].read(0, count)).all()
    assert (stores[0].read_learned(0, count) == stores[1].read_learned(0, count)).all()
    records[2]["messages"][3]["train"] = "false"  # type: ignore[index]
    records[1]["messages"][1]["train"] = "true"  # type: ignore[index]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    path = str(tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"d\.parquet:2: 'train' of a message must be true or false"):
        open_chats(path, chat_config(data_config, path), demo_tokenizer, tmp_path / "cache", 0)


def test_the_cache_follows_what_changes_tokens(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    folder = tmp_path / "tokenizer"
    demo_tokenizer.save(folder)
    tokenizer = load_tokenizer_from_folder(folder)
    names = set()
    for day, end in (("2026-11-29", "A"), ("2026-11-30", "A"), ("2026-11-30", "B")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        chat = replace(CHAT, template=str(template), date=day)
        config = chat_config(data_config, path, chat=chat, tokenizer=tokenizer.config)
        names.add(open_chats(path, config, tokenizer, tmp_path / "cache", 0).prefix)
    assert len(names) == 3


def test_too_few_conversations_for_a_split_are_named(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}] * 7)
    with pytest.raises(InputError, match=r"(?s)source c.*7 conversations.*data\.split"):
        build_train_and_validation(chat_config(data_config, path, split="95,5"), demo_tokenizer, 1)


def test_halves_of_characters_and_deep_nesting_are_named(
    data_config, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    for line, words in (
        ('{"prompt": "x\\ud83d", "completion": "y"}', "lone surrogate"),
        ("[" * 100_000, "nested too deep"),
        ("null", "one JSON object, received a NoneType"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match=rf"c\.jsonl:1: .*{words}"):
            build_train_and_validation(chat_config(data_config, str(path)), demo_tokenizer, 1)
