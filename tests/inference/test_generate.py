"""``python -m nemo_llm.generate`` as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.world import save_random_model
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(ranks.run(save_random_model, 1, str(tmp_path_factory.mktemp("model")), "gpt_tiny")[0])


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "nemo_llm.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generate_prints_and_writes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "texts.jsonl"
    result = run(f"checkpoint={folder}", "text=[One,Two]", f"output={output}", "sampling.max_new_tokens=5")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["One", "Two"]
    assert all(len(row["tokens"]) <= 5 for row in rows)
    # A random model also writes control characters, which reading a program's output as text may change.
    assert all(row["prompt"] in result.stdout for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text=a"], "checkpoint: is required"),
        (["checkpoint=/none"], "give either text or text_file"),
        (["checkpoint=/none", "text=a"], "no complete checkpoint there"),
        (["checkpoint=FOLDER", "text=a", "sampling.max_new_tokens=500"], "window of 128"),
        (["checkpoint=FOLDER", "text=a", "parallelism=cp2"], "context_parallel_size"),
        (["checkpoint=FOLDER", "text=a", "parallelism=tp2"], "1 process"),
        (["checkpoint=FOLDER", "text=a", "sampling.stop_tokens=[nix]"], "tokenizer has no such token"),
        (["checkpoint=FOLDER", "text=a", "chat=true"], "brought no chat template"),
        (["checkpoint=FOLDER", "text=a", "sampling.top_q=1"], "sampling.top_q"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_message(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_llm.config.commands.entry import run_tool
    from nemo_llm.config.commands.generate import GenerateConfig
    from nemo_llm.generate import main

    filled = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    assert run_tool("generate", GenerateConfig, main, filled) == 2
    assert message in capsys.readouterr().err
