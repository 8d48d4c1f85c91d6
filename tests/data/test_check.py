"""``trainer.check_only=true`` sees in the data what the run itself would refuse, and leaves nothing behind."""

from pathlib import Path

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.data import build
from nemo_llm.data.index.build import build_index
from nemo_llm.errors import InputError
from nemo_llm.train import check_only
from tests.data.test_index import job, write_jsonl


def checked(blend: str, cache: Path, *more: str) -> None:
    check_only(compose(["+model=gpt_tiny", f"data.blend=[{blend}]", f"data.cache_dir={cache}", *more]))


def test_the_sources_are_shown_before_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked("{name: plays, text: 'asset:shakespeare'}", tmp_path / "cache", "trainer.max_steps=10")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training, 320 samples of 128 tokens"
    assert lines[2].split()[:2] == ["plays", "132"]
    assert any(line.startswith("validation split") for line in lines)
    assert lines[-1].startswith("peak "), "what slurm/lib.sh shows stands last"


def test_what_a_run_would_refuse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short by far")
    (tmp_path / "long.txt").write_text("a whale and a ship " * 200)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no text"}\n')
    build_index(job([write_jsonl(tmp_path / "in.jsonl", ["the sea " * 400] * 50)], tmp_path / "indexed"))
    cases = {
        f"{{name: a, text: {tmp_path}/short.txt}}": "tokens for",
        f"{{name: a, text: {tmp_path}/long.txt}}": "for validation",
        f"{{name: a, text: {tmp_path}/bad.jsonl}}": "bad.jsonl",
        f"{{name: a, prefix: {tmp_path}/indexed}}": "was made with tokenizer demo",
    }
    for blend, words in cases.items():
        other = ["tokenizer=byte"] if "indexed" in blend else []
        with pytest.raises(InputError, match=words):
            checked(blend, tmp_path / "cache", *other)


def test_much_text_is_left_to_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_MOST_BYTES", 1000)
    checked("{name: plays, text: 'asset:shakespeare'}", tmp_path / "cache")
    assert "not opened by this check" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_none_of_the_checks_business(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    checked("{name: plays, text: 'asset:shakespeare'}", tmp_path / "file" / "cache")
