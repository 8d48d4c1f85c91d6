"""Text files of every kind of reader: indexing, conversations, labels, prompts, evaluation and lists of tokens."""

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_llm.config.sections.labelled import LabelledConfig
from nemo_llm.conversation.masks import ChatEncoder
from nemo_llm.conversation.prompts import read_prompts
from nemo_llm.corpus.documents import BadRecord, read_documents
from nemo_llm.corpus.records import read_all_records, read_records
from nemo_llm.data.sources.labelled_texts import LabelRules
from nemo_llm.errors import InputError
from nemo_llm.evaluation.classification import read_examples
from nemo_llm.evaluation.harness import find_task_files
from nemo_llm.tokenizers.tokenizer import Tokenizer
from tests.data.conftest import CHAT
from tools.extend_vocabulary import _read as read_tokens

SEPARATORS = "a\u2028b\u2029c\u0085d\fe\x1cf\rg"  # of all these str.splitlines makes lines, and a file has one


def prompts(path: Path) -> list:
    return read_prompts(str(path))


def examples(path: Path) -> list:
    return [example.text for example in read_examples(str(path), "text", "label", None)]


def records(path: Path) -> list:
    return [record["text"] for _, record in read_records(path)]


def documents(path: Path) -> list:
    return [document.text for document in read_documents(path, "text")]


READERS = [prompts, examples, records, documents]


@pytest.mark.parametrize("read", READERS)
def test_every_reader_of_json_lines_keeps_what_is_no_line_feed(read: Callable, tmp_path: Path) -> None:
    line = json.dumps({"text": SEPARATORS, "label": 1}, ensure_ascii=False)
    for name, opened in (
        ("a.jsonl", open),
        ("a.jsonl.gz", gzip.open),
        ("a.jsonl.bz2", bz2.open),
        ("a.jsonl.xz", lzma.open),
    ):
        path = tmp_path / name
        with opened(path, "wb") as file:
            file.write(f"\ufeff{line}\r\n\r\n{line}".encode())
        assert read(path) == [SEPARATORS] * 2


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "x\\ud83d", "label": "a"}',
        b"[" * 100_000,
        b'{"text": ' + b"1" * 5000 + b', "label": 1',
        b'{"text": "\xff", "label": 1}',
        b"null",
        b"[1]",
        b'{"text": null, "label": 1}',
        b'{"text": [1], "label": 1}',
    ],
    ids=["half a character", "deep", "cut off", "no UTF-8", "null", "list", "null text", "list as text"],
)
def test_every_reader_of_json_lines_names_what_is_no_text(read: Callable, line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good", "label": 1}\n' + line + b"\n")
    if read is records and b'"label": 1}' in line and b"\xff" not in line:
        return  # a reader of fields of any kind
    with pytest.raises(InputError, match=r"a\.jsonl(:|, line )2: "):
        read(path)


def test_numbers_are_no_prompts_and_bad_documents_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 5}\n')
    with pytest.raises(InputError, match=r'a\.jsonl, line 1: expected \{"text": "..."\}.*int'):
        read_prompts(str(path))
    path.write_text("[" * 100_000 + '\n{"text": "good"}\n')
    bad: list[BadRecord] = []
    assert [document.text for document in read_documents(path, "text", bad.append)] == ["good"]
    assert bad[0].detail == "nested too deep"


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_records_says_what_to_do(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a", "label": 1}], indent=indent))
    for read in (records, examples):
        with pytest.raises(InputError, match=r"a\.json:1: the file holds a JSON array(?s:.*)one JSON object a line"):
            read(path)


def test_prompts_of_plain_text_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeff{SEPARATORS}\r\n\r\n  two \n".encode())
    assert read_prompts(str(path)) == [SEPARATORS, "  two "]
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read_prompts(str(tmp_path / "a.txt.gz")) == [SEPARATORS, "  two "]


def test_lists_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff<|aa|>\r\n\r\nb\u2028b\n".encode())
    assert read_tokens(path) == ["<|aa|>", "b\u2028b"]
    path.write_bytes(b"<|aa|>\r\n<|bb|> \r\n")
    with pytest.raises(InputError, match=r"line 2: '<\|bb\|> ' begins or ends with white space"):
        read_tokens(path)


def test_tables_of_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_bytes(f'\ufefftext,label\r\n"good, {SEPARATORS}",1\r\n{long},0\r\n'.encode())
    assert examples(path) == [f"good, {SEPARATORS}", long]
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(path.read_bytes())
    assert examples(tmp_path / "a.csv.gz") == examples(path)
    path.write_bytes(b"text,label\nx,\xff\n")
    with pytest.raises(InputError, match="is no UTF-8 text"):
        list(read_records(path))


def test_labels_are_spelled_as_in_json_and_null_is_none(tmp_path: Path, demo_tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"text": "b", "label": 2}\n')
    found = read_examples(str(path), "text", "label", {"true": "spam", "2": "ham"})
    assert [example.label for example in found] == ["spam", "ham"]
    rules = LabelRules("text", LabelledConfig(label_key="label", too_long="error"), ["None", "true", "2"], 64, 0)
    targets = [rules.encode(record, demo_tokenizer, Counter())[1] for _, record in read_records(path)]  # type: ignore[index]
    assert targets == [1.0, 2.0]
    path.write_text('{"text": "a", "label": null}\n')
    with pytest.raises(InputError, match=r"line 1: the field 'label' holds null"):
        read_examples(str(path), "text", "label", None)
    with pytest.raises(InputError, match="the field 'label' holds null"):
        rules.encode({"text": "a", "label": None}, demo_tokenizer, Counter())


def places(folder: Path, name: str, lines: bytes) -> list[str]:
    """The same file as itself, compressed, as the only one of a folder, by a glob and in object storage."""
    upath = pytest.importorskip("upath")
    (folder / "one").mkdir(parents=True)
    (folder / "one" / name).write_bytes(lines)
    (folder / f"{name}.gz").write_bytes(gzip.compress(lines))
    remote = f"memory://{folder.name}/{name}"
    upath.UPath(remote).write_bytes(lines)
    return [f"{folder}/one/{name}", f"{folder}/{name}.gz", f"{folder}/one", f"{folder}/one/*", remote]


def test_prompts_tasks_and_labels_are_read_from_wherever_texts_are(tmp_path: Path) -> None:
    lines = b'{"text": "The sea is deep", "label": "a"}\n{"text": "The ship is old", "label": "b"}\n'
    table = b"text,label\nThe sea is deep,a\nThe ship is old,b\n"
    expected = ["The sea is deep", "The ship is old"]
    for name, content in (("lambada.jsonl", lines), ("lambada.csv", table)):
        for place in places(tmp_path / name, name, content):
            assert [example.text for example in read_examples(place, "text", "label", None)] == expected
            (file,) = find_task_files({"lambada": place}, {"lambada": place})
            for files in ([file.data], file.shots):
                assert [record["text"] for _, _, record in read_all_records(files)] == expected
            if name.endswith("jsonl"):
                assert read_prompts(place) == expected
    assert len(read_prompts("asset:moby_dick")) > 100
    with pytest.raises(InputError, match=r"lambada\.jsonl.*lambada\.csv would have the same name"):
        find_task_files({"lambada": [f"{tmp_path}/lambada.jsonl/one", f"{tmp_path}/lambada.csv/one"]}, {})
    (tmp_path / "other").mkdir()
    for name in ("a.md", "b.json"):
        (tmp_path / "other" / name).write_text("{}")
    with pytest.raises(InputError, match=r"tasks\.lambada: .*other: has no \.jsonl"):
        find_task_files({"lambada": f"{tmp_path}/other"}, {})


def test_conversations_from_a_table(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"One, two?","Yes,\nboth."\n')
    ((_, record),) = read_records(tmp_path / "a.csv")
    encoder = ChatEncoder(CHAT, demo_tokenizer)
    expected = encoder.encode_record({"prompt": "One, two?", "completion": "Yes,\nboth."}, "a")
    assert encoder.encode_record(record, "a") == expected
