"""The data cache and its lock: races on an empty cache with kills, damage, and stale locks."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_cache_trials import trial
from nemo_llm.config.sections.data import BlendSource
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.index.format import IndexedDataset, IndexedDatasetWriter
from nemo_llm.errors import InputError
from nemo_llm.storage.build_cache import build_once
from nemo_llm.storage.locks import build_lock
from nemo_llm.tokenizers.tokenizer import load_tokenizer
from tests.data.conftest import tokenizer_config


def test_races_with_kills_build_once(tmp_path: Path) -> None:
    """A few of the trials that benchmarks/data_cache_trials.py runs by the hundred."""
    choose = random.Random(3)
    results = [trial(tmp_path / str(number), 4, choose) for number in range(4) if not (tmp_path / str(number)).mkdir()]
    assert len({result["sha256"] for result in results}) == 1
    assert sum(result["killed"] for result in results) >= 2


def build_counting(calls: list[int]):
    def build(folder: Path) -> dict:
        calls.append(1)
        time.sleep(0.05)
        (folder / "data").write_bytes(b"x" * 1000)
        return {}

    return build


def test_threads_that_come_together_build_once(tmp_path: Path) -> None:
    calls: list[int] = []
    threads = [threading.Thread(target=build_once, args=(tmp_path / "entry", build_counting(calls))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_damaged_entry_is_built_again(tmp_path: Path) -> None:
    calls: list[int] = []
    build_once(tmp_path / "entry", build_counting(calls))
    (tmp_path / "entry" / "data").write_bytes(b"short")
    build_once(tmp_path / "entry", build_counting(calls))
    assert len(calls) == 2
    assert (tmp_path / "entry" / "data").stat().st_size == 1000
    (tmp_path / "entry" / "manifest.json").write_text("{")
    build_once(tmp_path / "entry", build_counting(calls))
    assert len(calls) == 3


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> dict:
        (folder / "data").write_bytes(b"x")
        raise InputError("no")

    with pytest.raises(InputError, match=r"^no$"):
        build_once(tmp_path / "entry", build)
    assert not list(tmp_path.iterdir())


def test_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = "import sys,os; from pathlib import Path; from nemo_llm.storage.locks import build_lock\n"
    code += "with build_lock(Path(sys.argv[1])): os._exit(1)"
    lock = tmp_path / "lock"
    subprocess.run([sys.executable, "-c", code, str(lock)], env={"PYTHONPATH": os.getcwd()}, check=False)
    assert lock.exists()
    began = time.monotonic()
    with build_lock(lock):
        assert time.monotonic() - began < 5
    assert not lock.exists()


def test_lock_of_another_node_is_taken_over_only_when_silent(tmp_path: Path, monkeypatch) -> None:
    lock = tmp_path / "lock"
    owner = json.dumps({"host": "elsewhere", "pid": 1, "start": "1", "nonce": "n"})
    lock.write_text(owner)
    monkeypatch.setattr("nemo_llm.storage.locks.SILENT_SECONDS", 0.6)
    alive = threading.Event()

    def beat() -> None:
        for _ in range(8):
            time.sleep(0.2)
            os.utime(lock)
        alive.set()

    thread = threading.Thread(target=beat)
    thread.start()
    with build_lock(lock):
        assert alive.is_set()  # not before the other fell silent
    thread.join()


def test_unwritable_cache_is_named(tmp_path: Path, data_config, demo_tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache_dir or NEMO_LLM_CACHE"):
        build_train_and_validation(data_config(cache_dir=str(tmp_path / "file")), demo_tokenizer, 1)


def write_dataset(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, data_config, demo_tokenizer) -> None:
    write_dataset(tmp_path / "d", [[1, 2, 2048]] * 100)
    config = data_config(blend=(BlendSource(name="web", prefix=str(tmp_path / "d")),), split=None)
    for _ in range(2):  # the second time from the note of the first scan
        with pytest.raises(InputError, match=r"source web: .* holds token id 2048, but the tokenizer has 2048"):
            build_train_and_validation(config, demo_tokenizer, 1)
    write_dataset(tmp_path / "d", [[1, 2, 2047]] * 100)  # a changed file is scanned again
    build_train_and_validation(config, demo_tokenizer, 1)


def test_dataset_of_another_tokenizer_is_refused(tmp_path: Path, data_config, demo_tokenizer) -> None:
    from nemo_llm.data.index.build import build_index
    from tests.data.test_index import SHAKESPEARE_FILE, job

    build_index(job([SHAKESPEARE_FILE], tmp_path / "d"))
    blend = (BlendSource(name="plays", prefix=str(tmp_path / "d")),)
    build_train_and_validation(data_config(blend=blend), demo_tokenizer, 1)
    byte = load_tokenizer(tokenizer_config(type="byte", path=None))
    with pytest.raises(InputError, match=r"source plays: .* made with tokenizer demo .* set data\.tokenizer"):
        build_train_and_validation(data_config(blend=blend), byte, 1)


def test_flat_blend_and_missing_files(tmp_path: Path, data_config, demo_tokenizer) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [[1, 2, 3]] * 200)
    config = data_config(blend=(0.3, str(tmp_path / "a"), 0.7, str(tmp_path / "b")), split=None)
    train = build_train_and_validation(config, demo_tokenizer, 1).train
    assert train.counts(64_000) == pytest.approx([19_200, 44_800], abs=1)
    assert [source.name for source in train.sources] == ["a", "b"]
    config = data_config(blend=(str(tmp_path / "a"), str(tmp_path / "none")), split=None)
    with pytest.raises(InputError, match=r"none\.idx: no such file"):
        build_train_and_validation(config, demo_tokenizer, 1)


def test_cached_text_is_the_text(data_config, demo_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Hello world. " * 50)
    (tmp_path / "two.txt").write_text("Bye. " * 50)
    blend = (BlendSource(name="mine", text=str(tmp_path / "*.txt")),)
    build_train_and_validation(data_config(blend=blend, split=None), demo_tokenizer, 1)
    (entry,) = (tmp_path / "cache").glob("text-*")
    data = IndexedDataset(entry / "data")
    texts = [demo_tokenizer.decode(data.document(number)[:-1].tolist()) for number in range(2)]
    assert texts == ["Hello world. " * 50, "Bye. " * 50]
    (tmp_path / "two.txt").write_text("Changed. " * 50)  # other content, another entry
    build_train_and_validation(data_config(blend=blend, split=None), demo_tokenizer, 1)
    assert len(list((tmp_path / "cache").glob("text-*"))) == 2
