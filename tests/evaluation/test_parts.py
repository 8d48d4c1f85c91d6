"""Windows, templates, records and task files: pure parts, without a model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.corpus.records import read_records
from nemo_llm.errors import ConfigError, InputError
from nemo_llm.evaluation.classification import (
    classify,
    compare_templates,
    encode_pair,
    read_examples,
    split_shots,
)
from nemo_llm.evaluation.harness import find_task_files
from nemo_llm.evaluation.perplexity import measure_perplexity, rolling_windows
from nemo_llm.evaluation.templates import Example, PromptTemplate, choose_shots, load_template, shipped_templates
from nemo_llm.tokenizers.tokenizer import load_tokenizer

BYTES = load_tokenizer(
    TokenizerConfig(
        name="byte",
        type="byte",
        path=None,
        eod_token=None,
        bos_token=None,
        parse_special_tokens=False,
        tiktoken_pattern=None,
        nemo_class=None,
        nemo_args={},
    )
)


class LetterModel:
    """A model to compute by hand: every byte has the same share, those of ``likely`` four times as much."""

    tokenizer = BYTES
    max_length = 16

    def __init__(self, likely: bytes) -> None:
        self.likely = set(likely)

    def log_share(self, token: int) -> float:
        return math.log((4.0 if token in self.likely else 1.0) / (256 + 3 * len(self.likely)))

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return [(sum(map(self.log_share, continuation)), False) for _, continuation in requests]

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        return ["" for _ in prompts]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 64])
@pytest.mark.parametrize("context", [1, 3, 8])
def test_windows_score_every_token_once_and_equal_lm_eval(length: int, context: int) -> None:
    tokens = list(range(100, 100 + length))
    ours = rolling_windows(tokens, 0, 8, context)
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, 0, 8, context)]
    assert [token for _, scored in ours for token in scored] == tokens
    assert ours == [(before, scored) for before, scored in theirs]


def test_bits_per_byte_of_a_known_model() -> None:
    result = measure_perplexity(LetterModel(b""), "uniform", ["abcé", "x" * 40])
    assert (result.num_bytes, result.num_tokens, result.num_documents) == (45, 45, 2)
    assert result.bits_per_byte == pytest.approx(8.0)
    assert result.perplexity == pytest.approx(256.0)


def test_shipped_templates_render_and_never_show_the_answer() -> None:
    example = Example("Good film.", "positive", {"text": "Good film.", "label": "SECRET"})
    shots = [Example("Bad film.", "negative", {"text": "Bad film."})]
    assert {"plain", "label", "question", "instruction"} <= set(shipped_templates())
    for name in shipped_templates():
        prompt = load_template(name).render(example, shots, ["positive", "negative"])
        assert "Good film." in prompt
        assert "Bad film." in prompt
        assert "negative" in prompt
        assert "SECRET" not in prompt
        assert prompt == prompt.rstrip()


def test_template_errors_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)no such template.*did you mean label"):
        load_template("lable")
    bad = tmp_path / "bad.jinja"
    bad.write_text("one\ntwo {{ text\n")
    with pytest.raises(InputError, match=r"bad\.jinja, line [23]: no Jinja template"):
        load_template(str(bad))
    with pytest.raises(InputError, match=r"mine, line 3: 'wrong' is undefined"):
        PromptTemplate("mine", "one\ntwo\n{{ wrong }}", "mine").render(Example("a", "b", {}), [], ["b"])


def test_shots_are_even_and_never_measured() -> None:
    examples = [Example(str(i), "ab"[i % 2], {}) for i in range(20)]
    shots, rest = split_shots(examples, 6, 1, None)
    assert sorted(shot.label for shot in shots) == list("aaabbb")
    assert not {shot.text for shot in shots} & {example.text for example in rest}
    assert len(rest) == 14
    assert choose_shots(examples, 6, 1) == shots
    assert choose_shots(examples, 6, 2) != shots


def test_classification_takes_the_likeliest_label(tmp_path: Path) -> None:
    file = tmp_path / "mails.jsonl"
    rows = [{"body": f"mail {i}", "kind": "s" if i % 3 else "h"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(str(file), "body", "kind", {"s": "spam", "h": "hams"})
    result = classify(LetterModel(b"sp"), load_template("label"), examples, [], ["spam", "hams"])
    assert set(result.predictions) == {"spam"}
    assert result.figures.accuracy.value == pytest.approx(8 / 12)
    assert result.figures.classes["hams"].recall == 0
    score = result.scores[0]["spam"]
    assert score == pytest.approx(sum(map(LetterModel(b"sp").log_share, b" spam")))
    other = classify(LetterModel(b"h"), PromptTemplate("mine", "{{ text }}", "mine"), examples, [], ["spam", "hams"])
    comparison = compare_templates([other, result], [example.label for example in examples])[0]
    assert (comparison.first, comparison.second) == ("label", "mine")
    assert comparison.difference == pytest.approx(4 / 12)
    assert not comparison.significant


def test_pairs_are_cut_where_the_context_ends() -> None:
    assert encode_pair(BYTES, "ab", " c") == ([97, 98], [32, 99])
    assert encode_pair(BYTES, "", "c") == ([256], [99])


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("q,1,2,3,4,A\nshort,row\n")
    columns = ["question", "A", "B", "C", "D", "answer"]
    with pytest.raises(InputError, match=r"a\.csv, line 2: 2 columns, expected 6"):
        list(read_records(table, columns))
    table.write_text('question,A,B,C,D,answer\n"two\nlines",1,2,3,4,B\n')
    assert [record["answer"] for _, record in read_records(table, columns)] == ["B"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "x", "label": "u"}\n\n[1]\n')
    with pytest.raises(InputError, match=r"a\.jsonl:3: a line must hold one JSON object"):
        list(read_records(lines))
    lines.write_text('{"text": "x", "label": "u"}\n')
    with pytest.raises(InputError, match=r"line 1: the field 'body' is missing.*text, label"):
        read_examples(str(lines), "body", "label", None)
    with pytest.raises(ConfigError, match="no word for the label 'u'"):
        read_examples(str(lines), "text", "label", {"v": "w"})
    with pytest.raises(InputError, match=r"(?s)no such task.*did you mean lambada"):
        find_task_files({"lambda": str(lines)}, {})
    with pytest.raises(InputError, match=r"tasks\.lambada: .*none: no such file"):
        find_task_files({"lambada": str(tmp_path / "none")}, {})


def test_prompt_templates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    for content, words in (
        (b"\xff", "cannot be read"),
        (b"{{ " + b"(" * 5000 + b")" * 5000 + b" }}", "nested too deep"),
        (b"a\n{% for %}", "line 2: no Jinja template"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"mine\.jinja.*{words}"):
            load_template(str(path))
