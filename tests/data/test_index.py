"""``tools/index_dataset.py`` from end to end: equality with Megatron's own way, kills, and bad inputs."""

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_llm.assets import resolve_path
from nemo_llm.corpus.documents import read_documents
from nemo_llm.data.index.build import IndexJob, build_index
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.index.plan import IndexSettings
from nemo_llm.errors import InputError, NemoLlmError
from nemo_llm.storage.build_cache import file_sha256
from tests.data.conftest import tokenizer_config

ROOT = Path(__file__).resolve().parents[2]
SHAKESPEARE_FILE = resolve_path("asset:shakespeare", "text")
TOOL = ROOT / "tools" / "index_dataset.py"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in read_documents(resolve_path("asset:shakespeare", "text"), "text")]


def settings(**changes) -> IndexSettings:
    keys = {
        "tokenizer": tokenizer_config(),
        "text_key": "text",
        "plain_text": "file",
        "encoding": "utf-8",
        "append_eod": True,
        "on_bad_record": "skip",
    }
    return IndexSettings(**(keys | changes))


def job(inputs: list[Path], prefix: Path, settings_changes: dict | None = None, **changes) -> IndexJob:
    keys = {"cache": prefix.parent / "cache", "fast_path": False} | changes
    return IndexJob(
        inputs=[str(path) for path in inputs], prefix=prefix, settings=settings(**(settings_changes or {})), **keys
    )


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_tool(*arguments: str, **keywords) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **keywords)


def documents_of(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data.document(number).tolist() for number in range(data.num_documents)]


def test_tool_writes_what_megatrons_builder_would(
    texts: list[str], tmp_path: Path, demo_tokenizer, proof_cache: Path
) -> None:
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    source = write_jsonl(tmp_path / "in.jsonl", texts[:40] * 3)
    result = run_tool(
        f"input={source}", f"output_prefix={tmp_path}/out/d", "tokenizer=demo", "workers=2", f"cache_dir={proof_cache}"
    )
    assert result.returncode == 0, result.stderr
    assert "120 documents" in result.stdout

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in texts[:40] * 3:
        ids = [*demo_tokenizer.encode(text), demo_tokenizer.eod_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out/d{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()

    manifest = json.loads((tmp_path / "out/d.manifest.json").read_text())
    assert manifest["documents"] == 120
    assert manifest["tokens"] == IndexedDataset(tmp_path / "out/d").num_tokens
    assert manifest["files"][".bin"]["sha256"] == file_sha256(tmp_path / "out/d.bin")
    assert manifest["sources"][0]["sha256"] == file_sha256(source)
    assert manifest["tokenizer"]["fingerprint"] == demo_tokenizer.fingerprint
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d.bin", "d.idx", "d.manifest.json"]

    changed = os.stat(tmp_path / "out/d.bin").st_mtime_ns
    again = run_tool(f"input={source}", f"output_prefix={tmp_path}/out/d", "tokenizer=demo", f"cache_dir={tmp_path}")
    assert again.returncode == 0
    assert os.stat(tmp_path / "out/d.bin").st_mtime_ns == changed  # nothing to do
    other = run_tool(f"input={source}", f"output_prefix={tmp_path}/out/d", "tokenizer=byte", f"cache_dir={tmp_path}")
    assert other.returncode == 2
    assert "overwrite=true" in other.stderr


def test_formats_and_compressions_give_the_same_documents(texts: list[str], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    some = [text.strip() for text in texts[:9]]
    lines = write_jsonl(tmp_path / "a.jsonl", some).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pyarrow.table({"text": some}), tmp_path / "d.parquet")
    (tmp_path / "e").mkdir()
    for number, text in enumerate(some):
        (tmp_path / "e" / f"{number}.txt").write_text(text)
    results = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e"):
        build_index(job([tmp_path / name], tmp_path / f"out-{name}"))
        results.append(documents_of(tmp_path / f"out-{name}"))
    assert all(result == results[0] for result in results)
    assert len(results[0]) == 9


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".txt.gz"])
def test_damaged_files_are_named(texts: list[str], suffix: str, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = write_jsonl(tmp_path / "in.jsonl", texts).read_bytes()
    compress = zstandard.compress if suffix.endswith(".zst") else gzip.compress
    source = tmp_path / f"cut{suffix}"
    source.write_bytes(compress(lines)[:-20_000])
    with pytest.raises(InputError, match=f"cut{suffix}"):
        build_index(job([source], tmp_path / "d"))
    assert not (tmp_path / "d.idx").exists()


def test_encodings_and_documents_by_line(tmp_path: Path, demo_tokenizer) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve café\n\nsecond línea".encode("latin-1"))
    build_index(job([tmp_path / "latin.txt"], tmp_path / "d", {"encoding": "latin-1", "plain_text": "line"}))
    texts = [demo_tokenizer.decode(ids[:-1]) for ids in documents_of(tmp_path / "d")]
    assert texts == ["naïve café", "second línea"]
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "x"}\n')
    build_index(job([tmp_path / "bom.jsonl"], tmp_path / "b"))
    assert documents_of(tmp_path / "b") == [[*demo_tokenizer.encode("x"), demo_tokenizer.eod_id]]
    with pytest.raises(InputError, match="utf-16"):
        build_index(job([tmp_path / "latin.txt"], tmp_path / "e", {"encoding": "utf-16"}))


def test_kills_at_random_moments_never_lose_or_repeat_a_document(texts: list[str], tmp_path: Path) -> None:
    """Kill -9 the tool again and again, with another number of workers each time; the result is that of one run."""
    choose = random.Random(7)
    documents = [f"{number} {text}" for number, text in enumerate(texts * 5)]
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    build_index(job([source], tmp_path / "whole"))
    kills = 0
    for attempt in range(60):
        command = [sys.executable, str(TOOL), f"input={source}", f"output_prefix={tmp_path}/killed", "tokenizer=demo"]
        command += [f"workers={choose.choice((0, 1, 2))}", "fast_path=false", f"cache_dir={tmp_path}/cache"]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=choose.uniform(0.5, 1.5) + attempt / 3)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if (tmp_path / "killed.idx").exists():  # killed between the last rename and the exit
                assert (tmp_path / "killed.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert kills
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"killed{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not list(tmp_path.glob("killed.partial*"))


def test_killed_worker_is_reported_and_the_rerun_goes_on(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts * 4)
    first = job([source], tmp_path / "d", workers=1)

    def kill_worker(progress) -> None:
        if progress.shards_done == 2:
            children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
            workers = [int(pid) for path in children for pid in path.read_text().split()]
            commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers}
            (worker,) = [pid for pid, command in commands.items() if b"spawn_main" in command]
            os.kill(worker, signal.SIGKILL)

    with pytest.raises(NemoLlmError, match="a worker was killed"):
        build_index(first, kill_worker)
    assert not (tmp_path / "d.idx").exists()
    done = []
    build_index(first, lambda progress: done.append(progress.shards_done))
    assert done[0] >= 3  # it did not begin anew
    build_index(job([source], tmp_path / "whole"))
    assert (tmp_path / "d.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


BAD_LINES = [
    b'{"text": "good"}',
    b'{"text": "broken',
    b'{"txt": "other field"}',
    b'{"text": 7}',
    b'{"text": ""}',
    b'{"text": "\xff\xfe"}',
    b'{"text": "\\ud800"}',
    b"",
    b"[1]",
    b'{"text": "good too"}',
]


def test_bad_records_are_counted_and_named(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(BAD_LINES))
    with pytest.raises(InputError, match="7 of 9 records are bad") as error:
        build_index(job([source], tmp_path / "d"))
    assert f"{source}:2: malformed JSON" in str(error.value)
    assert not (tmp_path / "d.idx").exists()
    manifest = build_index(job([source], tmp_path / "d", max_bad_fraction=1.0))
    assert manifest["documents"] == 2
    assert manifest["bad_records"] == {
        "malformed JSON": 1,
        "missing field": 2,
        "field is not text": 1,
        "empty document": 1,
        "invalid UTF-8": 2,
    }
    with pytest.raises(InputError, match=r"in\.jsonl:2: malformed JSON"):
        build_index(job([source], tmp_path / "e", {"on_bad_record": "error"}))


def test_line_numbers_are_right_in_later_shards(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts * 4)
    lines = source.read_bytes().split(b"\n")
    lines[500] = b"{"
    source.write_bytes(b"\n".join(lines))
    manifest = build_index(job([source], tmp_path / "d"))
    assert manifest["bad_examples"][0].startswith(f"{source.resolve()}:501: malformed JSON")
    assert manifest["documents"] == len(texts) * 4 - 1


def test_plain_text_with_a_bad_byte_leaves_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"fine\n")
    (tmp_path / "in" / "b.txt").write_bytes(b"word " * 700_000 + b"\nline two \xff here\n")
    (tmp_path / "in" / "c.txt").write_bytes(b"")
    manifest = build_index(job([tmp_path / "in"], tmp_path / "d", max_bad_fraction=0.9))
    assert manifest["documents"] == 1
    assert manifest["bad_records"] == {"invalid UTF-8": 1, "empty document": 1}
    assert "b.txt:2: invalid UTF-8" in manifest["bad_examples"][0]


def test_full_disk_is_reported_and_the_rerun_goes_on(texts: list[str], tmp_path: Path) -> None:
    """The disk is full for this process at half a megabyte a file, as far as the kernel's answer to a write goes."""
    source = write_jsonl(tmp_path / "in.jsonl", texts * 3)
    arguments = [f"input={source}", f"output_prefix={tmp_path}/d", "tokenizer=demo", "workers=0", "fast_path=false"]
    arguments.append(f"cache_dir={tmp_path}/cache")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))

    result = run_tool(*arguments, preexec_fn=limit)
    assert result.returncode == 2
    assert "no space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "d.idx").exists()
    assert run_tool(*arguments).returncode == 0
    build_index(job([source], tmp_path / "whole"))
    assert (tmp_path / "d.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts[:2])
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        build_index(job([source], tmp_path / "locked" / "d"))


def test_a_file_in_place_of_the_folder_is_refused(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        build_index(job([source], tmp_path / "file" / "d"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output_prefix=x"], "input: is required"),
        (["input=/nowhere", "output_prefix=x"], "/nowhere: no such file"),
        (["input=/nowhere", "output_prefix=x", "worker=3"], "worker"),
        (["input=/nowhere", "output_prefix=x", "workers=-1"], "workers"),
        (["input=/nowhere", "output_prefix=x", "tokenizer=none"], "none"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run_tool(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_interrupted_run_with_other_settings_is_not_mixed(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts * 4)

    def stop(progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(job([source], tmp_path / "d"), stop)
    other = {"tokenizer": tokenizer_config(type="byte", path=None)}
    with pytest.raises(InputError, match="restart=true"):
        build_index(job([source], tmp_path / "d", other))
    time.sleep(0.01)
    manifest = build_index(job([source], tmp_path / "d", other, restart=True))
    assert manifest["tokenizer"]["type"] == "byte"
    assert manifest["tokens"] == sum(len(text.encode()) + 1 for text in texts * 4)


def test_damaged_partial_tokens_are_found(texts: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts * 4)

    def stop(progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(job([source], tmp_path / "d"), stop)
    tokens = tmp_path / "d.partial" / "data.bin"
    data = bytearray(tokens.read_bytes())
    data[100] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(InputError, match="do not match its journal"):
        build_index(job([source], tmp_path / "d"))


def test_fast_path_that_gives_other_ids_is_not_used(texts: list[str], tmp_path: Path, proof_cache: Path) -> None:
    """What the proof rests on was changed behind its back; the comparison on the corpus itself finds it."""
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    shutil.copytree(proof_cache, tmp_path / "cache")
    build_index(job([source], tmp_path / "right"))
    build_index(job([source], tmp_path / "fast", fast_path=True))
    (spec,) = (tmp_path / "cache").glob("proof-*/spec.json")
    saved = json.loads(spec.read_text())
    ids = saved["id_of_rank"]
    ids[-1], ids[300] = ids[300], ids[-1]
    spec.write_text(json.dumps(saved).ljust(spec.stat().st_size)[: spec.stat().st_size])
    for workers in (0, 1):
        manifest = build_index(job([source], tmp_path / f"d{workers}", fast_path=True, workers=workers))
        assert manifest["encoded_by"].startswith("ordinary: different ids for")
    for name in ("fast", "d0", "d1"):
        assert (tmp_path / f"{name}.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()


def test_lines_longer_than_shards_are_read_once_each(tmp_path: Path, demo_tokenizer) -> None:
    """Shards are of a megabyte here: documents of 3 MB, of a few bytes, and one line without its newline."""
    documents = ["word " * 600_000, "a", "b" * 2_100_000, "", "c", "d e " * 500_000]
    source = tmp_path / "in.txt"
    source.write_text("\n".join(documents))
    manifest = build_index(job([source], tmp_path / "d", {"plain_text": "line", "append_eod": False}))
    expected = [text.strip("\n") for text in documents if text.strip()]
    assert manifest["documents"] == len(expected)
    data = IndexedDataset(tmp_path / "d")
    for number, text in enumerate(expected):
        assert demo_tokenizer.decode(data.document(number).tolist()) == text
