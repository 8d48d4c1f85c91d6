"""tools/convert_checkpoint.py between peft's folders and adapters of ours: both gates, tensors back bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.errors import InputError
from tests.convert.cases import CASES, make_hf_model
from tests.ranks import RankPool

SLOW = pytest.mark.slow


def _convert(source: str, target: str, input_: Path, output: Path, *more: str) -> Any:
    from nemo_llm.convert.convert import convert
    from nemo_llm.convert.peft_adapters import convert_adapter

    arguments = [f"source_format={source}", f"target_format={target}", f"input='{input_}'", f"output='{output}'", *more]
    cfg = compose_tool("convert_checkpoint", ConvertConfig, arguments)
    return (convert_adapter if "peft" in (source, target) else convert)(cfg)


def _in_and_out(folder: str, kind: str) -> list[Any]:
    import peft

    at = Path(folder)
    model = make_hf_model(CASES[0], at / "hf")
    _convert("hf", "nemo_llm", at / "hf", at / "base", "verify=false")
    configs: dict[str, Any] = {
        "lora": peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}
        ),
        "dora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "gate_proj"], use_dora=True),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    adapted = peft.get_peft_model(model, configs[kind])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(at / "adapter")
    imported = _convert("peft", "nemo_llm", at / "adapter", at / "ours", f"base='{at / 'base'}'")
    exported = _convert("nemo_llm", "peft", at / "ours", at / "back")
    return [imported.gate, exported.gate]


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        pytest.param("dora", marks=SLOW),
        pytest.param("ia3", marks=SLOW),
        pytest.param("prompt_tuning", marks=SLOW),
    ],
)
def test_in_and_out_again(kind: str, tmp_path: Path, ranks: RankPool) -> None:
    (reports,) = ranks.run(_in_and_out, 1, str(tmp_path), kind)
    assert all(report.passed and report.largest_logit > 0.5 for report in reports)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].flatten(), after[name].flatten()) for name in before)
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text())["gate"]["passed"]


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match="from and to nemo_llm alone"):
        _convert("hf", "peft", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(InputError, match="base: needed"):
        _convert("peft", "nemo_llm", tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
