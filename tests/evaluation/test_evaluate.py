"""``python -m nemo_llm.evaluate`` and ``python -m nemo_llm.chat`` as a user calls them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.evaluate import EvaluateConfig
from nemo_llm.evaluate import main
from tests.inference.world import save_random_model
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def models(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    folders = []
    for name, std in (("one", 0.2), ("two", 0.02)):
        (root / name).mkdir()
        folders += ranks.run(save_random_model, 1, str(root / name), "gpt_tiny", f"model.init_method_std={std}")
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times. " * 8)
    rows = [{"text": f"mail {i}", "label": "ab"[i % 2]} for i in range(10)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lambada.jsonl").write_text('{"text": "The sea is deep"}\n{"text": "The ship is old"}\n')
    return folder


def test_two_models_side_by_side(models: list[str], data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "nemo_llm.evaluate", f"checkpoint=[{','.join(models)}]"]
    command += [f"texts={data}/text.txt", f"tasks={{lambada: {data}/lambada.jsonl}}"]
    command += [f"classification={{file: {data}/labels.jsonl, text_key: text, label_key: label, label_words: null, "]
    command[-1] += "num_fewshot: 2, shots_file: null}"
    command += ["prompt_templates=[label,question]", f"output={tmp_path}/all.json", f"report={tmp_path}/all.html"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    one, two = json.loads((tmp_path / "all.json").read_text())
    for model, row in ((one, 1), (two, 2)):
        perplexity = model["perplexity"][0]
        assert perplexity["num_bytes"] == perplexity["num_tokens"] == (data / "text.txt").stat().st_size
        assert perplexity["bits_per_byte"] == pytest.approx(perplexity["loss"] / math.log(2))
        line = next(line for line in result.stdout.splitlines() if "bits per byte" in line)
        assert line.split()[-3 + row] == f"{perplexity['bits_per_byte']:.4f}"
        assert model["tasks"]["lambada"]["samples"] == 2
        assert model["classification"][0]["figures"]["num_examples"] == 8, "two examples went into the prompt"
        assert len(model["comparisons"]) == 1
    assert two["perplexity"][0]["perplexity"] == pytest.approx(257, rel=0.2), "small weights know nothing"
    page = (tmp_path / "all.html").read_text()
    assert page.count("<svg") == 1 + 2 + 2 + 4, "plots, and a confusion matrix of each model and template"
    assert "http" not in page, "the page needs nothing from elsewhere"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=MODEL"], "nothing to measure"),
        (["checkpoint=MODEL", "texts=/none"], "no such file"),
        (["checkpoint=MODEL", "tasks={lambda: x}"], "did you mean lambada"),
        (["checkpoint=MODEL", "texts=DATA/text.txt", "prefix_token=nix"], "tokenizer has no such token"),
        (["checkpoint=[MODEL,/none]", "texts=DATA/text.txt"], "no complete checkpoint there"),
        (
            ["checkpoint=MODEL", "classification={file: DATA/labels.jsonl}"],
            "classification.text_key",
        ),
    ],
)
def test_bad_input_is_one_message(
    models: list[str], data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.replace("MODEL", models[0]).replace("DATA", str(data)) for argument in arguments]
    assert run_tool("evaluate", EvaluateConfig, main, filled) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer_is_named(
    models: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "step_00000000"
    shutil.copytree(Path(models[0]) / "step_00000000", copy)
    shutil.rmtree(copy / "tokenizer")
    assert run_tool("evaluate", EvaluateConfig, main, [f"checkpoint={copy}", f"texts={data}/text.txt"]) == 2
    assert "holds no tokenizer/ folder" in capsys.readouterr().err


def test_chat_answers_every_line(models: list[str], tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    command = [sys.executable, "-W", "ignore", "-m", "nemo_llm.chat", f"checkpoint={models[0]}"]
    command += [f"chat_template={template}", "sampling.max_new_tokens=4", "sampling.ignore_eod=true"]
    command += ["sampling.temperature=0", "sampling.top_p=null"]
    lines = "Hi\n/reset\nHi\n" + "x" * 130 + "\nHi again\n/quit\nnever read\n"
    result = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    first, second, too_long, *_ = result.stdout.split(b"\n")
    assert first == second, "after /reset the same question gets the same answer"
    assert b"error: the message has" in too_long


def test_a_template_without_a_chat_has_no_effect(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_llm.config.commands.generate import GenerateConfig
    from nemo_llm.generate import main as generate

    command = [f"checkpoint={models[0]}", "text=Hi", "chat_template=plain"]
    assert run_tool("generate", GenerateConfig, generate, command) == 2
    assert "chat_template = 'plain': has no effect" in capsys.readouterr().err
