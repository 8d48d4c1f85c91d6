"""Conversations as data: forms of records, templates, which tokens are learned, packing, errors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nemo_llm.config.data import BlendSource, DataConfig
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.chat_format import BadChatError, to_messages
from nemo_llm.data.chat_store import ChatEncoder
from nemo_llm.data.chat_template import NAMED_TEMPLATES, load_template
from nemo_llm.data.tokenizer import Tokenizer, load_tokenizer
from nemo_llm.errors import ConfigError, InputError
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
    assert [(m["role"], m["content"]) for m in to_messages(record, CHAT)] == [("user", "a\n\nb"), ("assistant", "c")]


def test_two_named_fields_and_a_system_prompt() -> None:
    config = replace(CHAT, prompt_key="question", answer_key="answer", system_prompt="Be short.")
    messages = to_messages({"question": "q", "answer": "a", "id": 3}, config)
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]


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
        to_messages(record, CHAT)
    for word in words:
        assert word in str(caught.value)


def test_errors_name_file_and_line(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(InputError, match=r"c\.jsonl:2: no field 'completion'"):
        build_train_and_validation(chat_config(data_config, path), demo_tokenizer, 1)


def encoder(config: DataConfig, tokenizer: Tokenizer) -> ChatEncoder:
    return ChatEncoder(config.chat, config.seq_length + 1, tokenizer, config.tokenizer.path, 0)


def learned_text(config: DataConfig, tokenizer: Tokenizer, messages: list[dict]) -> str:
    chat = encoder(config, tokenizer).encode(messages)
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
    template = load_template(name, demo_tokenizer, None)
    expected = theirs.apply_chat_template(
        TWO_TURNS, chat_template=template.source, tokenize=False, eod_token=template._variables["eod_token"]
    )
    assert template.render(TWO_TURNS) == expected


def test_a_template_that_rewrites_the_past_is_refused(data_config, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = data_config(chat=replace(CHAT, template=str(path)))
    with pytest.raises(BadChatError, match="does not round-trip"):
        encoder(config, demo_tokenizer).encode(TWO_TURNS)


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
