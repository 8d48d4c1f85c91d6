"""Tokens that begin and end a text come in and go out as transformers has them."""

import dataclasses
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from nemo_llm.checkpoint.saved_run import TOKENIZER_FILE_NAME
from nemo_llm.config.commands.generate import SamplingConfig
from nemo_llm.config.compose.load import compose
from nemo_llm.conversation.prompts import encode_prompt
from nemo_llm.data.sources.labelled_texts import text_ids
from nemo_llm.errors import CheckpointError
from nemo_llm.evaluation.classification import encode_pair
from nemo_llm.inference.decoder import stop_ids
from nemo_llm.tokenizers.tokenizer import load_tokenizer, load_tokenizer_from_folder
from tests.convert.cases import CASES, SMALL, make_hf_model
from tests.convert.test_families import convert_with
from tests.ranks import RankPool

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
VOCABULARY = 300
TEXTS = ["x", "", "The capital of France is", "  two  spaces\n\n", "Käse, 12,50 €; 你好 🙂", "def f(x):\n\treturn x"]


def build(kind: str) -> Tokenizer:
    """Forms in which models name and add their beginning-of-text token."""
    if kind == "gemma":  # spaces as a letter of their own, bytes for what is not in the vocabulary
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(number) for number in range(33, 127)] + ["▁"]
        trained = [*SPECIAL, *(f"<0x{number:02X}>" for number in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY + 256, special_tokens=trained, initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the capital of France is Paris, the capital of Italy is Rome"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    begin = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)]}
    both = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    if kind in ("template", "gemma"):
        tokenizer.post_processor = processors.TemplateProcessing(**begin)
    elif kind == "template and end":
        tokenizer.post_processor = processors.TemplateProcessing(**both)
    elif kind == "llama3":
        bytes_and_begin = [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(**begin)]
        tokenizer.post_processor = processors.Sequence(bytes_and_begin)
    elif kind == "qwen":
        tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


KINDS = {
    "template": 1,
    "template and end": 1,
    "llama3": 1,
    "gemma": 1,
    "qwen": None,
    "none": None,
    "add_bos_token": None,
}


def write_tokenizer(folder: Path, kind: str, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build(kind).save(str(folder / "tokenizer.json"))
    given = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if kind == "add_bos_token":  # which transformers does not read beside a tokenizer.json
        given["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps({**given, **settings}))


def write_config(folder: Path, **settings: Any) -> None:
    config = {"model_type": "llama", **SMALL, "rms_norm_eps": 1e-6, **settings}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_begin_as_with_transformers(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "hf", kind)
    write_config(tmp_path / "hf")
    tokenizer = load_tokenizer(compose(["+model=from_hf", f"model.hf_path={tmp_path / 'hf'}"]).data.tokenizer)
    tokenizer.save(tmp_path / "saved")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    draw = random.Random(5)
    drawn = ["".join(draw.choices("aA é\n\t.,0你🙂\u2028-", k=draw.randrange(1, 40))) for _ in range(200)]
    for ours in (tokenizer, load_tokenizer_from_folder(tmp_path / "saved")):
        assert ours.bos_id == KINDS[kind]
        for text in [*TEXTS, *drawn]:
            expected = list(theirs(text).input_ids)
            if kind == "template and end":
                assert expected.pop() == 2  # a text to continue has no end
            assert text_ids(text, ours) == expected
            assert encode_prompt(ours, text) == (expected or [ours.eod_id])
            if text:
                assert encode_pair(ours, text, " Paris")[0] == expected


@pytest.mark.parametrize("kind", ["template", "qwen"])
def test_contexts_of_lm_eval_are_those_of_its_own_model_class(kind: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from nemo_llm.evaluation.harness import build_lm

    make_hf_model(_case(), tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs: Any = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "hf"), device="cpu")
    tokenizer = load_tokenizer(compose(["+model=from_hf", f"model.hf_path={tmp_path / 'hf'}"]).data.tokenizer)

    class Scorer:
        max_length = 64

    Scorer.tokenizer = tokenizer  # type: ignore[attr-defined]
    ours: Any = build_lm(Scorer())  # type: ignore[arg-type]
    for context, continuation in [("The capital of France is", " Paris"), ("Käse ", "und"), ("a\n", "b c")]:
        assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)


def _case() -> Any:
    return dataclasses.replace(CASES[0], settings={**CASES[0].settings, "vocab_size": VOCABULARY})


GENERATION: list[tuple[dict[str, Any], dict[str, Any] | None, list[int], dict[str, Any]]] = [
    ({"eos_token_id": 2}, {"eos_token_id": [2, 4], "temperature": 0.5}, [2, 4], {"eos_token_id": [2, 4]}),
    ({"eos_token_id": [2, 4], "pad_token_id": 5}, None, [2, 4], {"eos_token_id": [2, 4], "pad_token_id": 5}),
    ({"eos_token_id": 4}, {"temperature": 0.5}, [4], {"bos_token_id": 1, "eos_token_id": 4}),
    ({"eos_token_id": None, "bos_token_id": None}, None, [2], {"bos_token_id": 1, "eos_token_id": 2}),
    ({"eos_token_id": "absent", "bos_token_id": 3}, {"eos_token_id": None}, [2], {"bos_token_id": 3}),
]


def _there_and_back(folder: str, more: tuple[str, ...] = ()) -> list[str]:
    there = convert_with("hf", "nemo_llm", Path(folder) / "hf", Path(folder) / "ours", *more).gate
    back = convert_with("nemo_llm", "hf", Path(folder) / "ours", Path(folder) / "back", *more).gate
    return [str(there), str(back)]


def _make(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> None:
    make_hf_model(_case(), folder)
    saved = json.loads((folder / "config.json").read_text())
    merged = {key: value for key, value in {**saved, **config}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(merged))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def ends_of(folder: Path) -> frozenset[int]:
    tokenizer = load_tokenizer_from_folder(folder)
    sampling = compose_sampling()
    return stop_ids(tokenizer, sampling)


def compose_sampling() -> SamplingConfig:
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.generate import GenerateConfig

    return compose_tool("generate", GenerateConfig, ["checkpoint=x", "text=x"]).sampling


@pytest.mark.parametrize(("config", "generation", "ends", "exported"), GENERATION)
def test_end_tokens_are_those_that_the_first_file_names(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    ends: list[int],
    exported: dict[str, Any],
    tmp_path: Path,
    ranks: RankPool,
) -> None:
    _make(tmp_path / "hf", config, generation)
    write_tokenizer(tmp_path / "hf", "template")
    ranks.run(_there_and_back, 1, str(tmp_path), ("verify=false",))
    tokenizer = load_tokenizer_from_folder(tmp_path / "ours" / "tokenizer")
    assert list(tokenizer.end_ids) == ends
    assert set(ends) <= ends_of(tmp_path / "ours" / "tokenizer")
    out = json.loads((tmp_path / "back" / "config.json").read_text())
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    for key, value in exported.items():
        assert (out[key], written[key]) == (value, value)
    assert written.get("temperature") == (generation or {}).get("temperature")


def test_a_folder_without_a_tokenizer_keeps_its_ids(tmp_path: Path, ranks: RankPool) -> None:
    _make(tmp_path / "hf", {"eos_token_id": [2, 4], "bos_token_id": 1, "pad_token_id": 5}, None)
    ranks.run(_there_and_back, 1, str(tmp_path), ("verify=false",))
    out = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (out["bos_token_id"], out["eos_token_id"], out["pad_token_id"]) == (1, [2, 4], 5)


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "eos": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}


@pytest.mark.parametrize(("template", "ends"), [("chatml", [2, 4]), ("eos", 2), ("plain", 2)])
def test_the_turn_end_of_the_saved_template_is_an_end_token(
    template: str, ends: Any, tmp_path: Path, ranks: RankPool
) -> None:
    _make(tmp_path / "hf", {}, None)
    write_tokenizer(tmp_path / "hf", "template")
    (tmp_path / "hf" / "chat_template.jinja").write_text(TEMPLATES[template])
    ranks.run(_there_and_back, 1, str(tmp_path), ("verify=false",))
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == ends
    assert (4 in ends_of(tmp_path / "ours" / "tokenizer")) >= (template == "chatml")


def test_the_gate_compares_token_ids(tmp_path: Path, ranks: RankPool) -> None:
    _make(tmp_path / "hf", {}, None)
    write_tokenizer(tmp_path / "hf", "llama3")
    (reports,) = ranks.run(_there_and_back, 1, str(tmp_path))
    assert all("texts have the token ids of transformers' own" in report for report in reports)


def test_a_tokenizer_that_differs_is_refused(tmp_path: Path) -> None:
    from nemo_llm.convert.hf import compare_token_ids

    write_tokenizer(tmp_path / "hf", "template")
    write_config(tmp_path / "hf")
    load_tokenizer(compose(["+model=from_hf", f"model.hf_path={tmp_path / 'hf'}"]).data.tokenizer).save(tmp_path / "a")
    assert compare_token_ids(tmp_path / "hf", tmp_path / "a", beginning=True) > 3
    saved = json.loads((tmp_path / "a" / TOKENIZER_FILE_NAME).read_text())
    (tmp_path / "a" / TOKENIZER_FILE_NAME).write_text(json.dumps({**saved, "bos_token": None}))
    with pytest.raises(CheckpointError, match=r"differ on 'The capital of France is': transformers \[1, "):
        compare_token_ids(tmp_path / "hf", tmp_path / "a", beginning=True)
    compare_token_ids(tmp_path / "hf", tmp_path / "a", beginning=False)


def test_a_checkpoint_that_was_saved_without_its_beginning_keeps_it_and_says_so(
    tmp_path: Path, ranks: RankPool, caplog: pytest.LogCaptureFixture
) -> None:
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.generate import GenerateConfig
    from nemo_llm.inference.loaded_model import open_checkpoint

    _make(tmp_path / "hf", {}, None)
    write_tokenizer(tmp_path / "hf", "template")
    ranks.run(_there_and_back, 1, str(tmp_path), ("verify=false",))
    place = compose_tool("generate", GenerateConfig, [f"checkpoint={tmp_path / 'ours'}", "text=x"])
    caplog.set_level(logging.WARNING)
    assert open_checkpoint(place, tmp_path / "ours", 1).tokenizer.bos_id == 1
    assert not caplog.records
    file = tmp_path / "ours" / "tokenizer" / TOKENIZER_FILE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}))
    assert open_checkpoint(place, tmp_path / "ours", 1).tokenizer.bos_id is None
    (record,) = caplog.records
    assert "puts <s> before a text" in record.getMessage()
    assert "tools/convert_checkpoint.py" in record.getMessage()
