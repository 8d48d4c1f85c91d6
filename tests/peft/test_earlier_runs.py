"""A LoRA run of commit 96e171a, made by that commit's own code, merges and exports today.

    python -m nemo_llm.train +model=gpt_tiny KEYS trainer.max_steps=1 run.dir=base
    python -m nemo_llm.train +model=gpt_tiny KEYS trainer.max_steps=2 run.dir=lora checkpoint.init_from=base peft=lora

with the keys that stand in the files' first lines. Its configuration lacks keys that are younger.
"""

import contextlib
from pathlib import Path

from tests.ranks import RankPool

GOLDEN = Path(__file__).parents[1] / "golden" / "runs" / "lora_96e171a"


def merge(output: str) -> float:
    """Largest change of a weight."""
    from nemo_llm.checkpoint.inspect import read_tensors, tensors
    from nemo_llm.convert.peft_adapters import merge_checkpoint

    with contextlib.chdir(GOLDEN):  # the run names its base relative to where it was started
        merged = merge_checkpoint(Path("lora"), Path(output))
    names = [name for name in tensors(merged) if name.endswith("weight")]
    before = dict(read_tensors(GOLDEN / "base" / "checkpoints" / "step_00000001", names))
    return max(float((before[name].float() - after.float()).abs().max()) for name, after in read_tensors(merged, names))


def export(output: str) -> tuple[bool, float]:
    """Whether peft computed the same logits from the exported adapter, and the largest of them."""
    from nemo_llm.config.commands.convert import ConvertConfig
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.convert.peft_adapters import convert_adapter

    keys = ["source_format=nemo_llm", "target_format=peft", "input=lora", f"output={output}"]
    with contextlib.chdir(GOLDEN):
        outcome = convert_adapter(compose_tool("convert_checkpoint", ConvertConfig, keys))
    assert outcome.gate is not None
    return outcome.gate.passed, outcome.gate.largest_logit


def test_it_merges(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(merge, 1, str(tmp_path / "merged"))[0] > 1e-2


def test_it_exports(ranks: RankPool, tmp_path: Path) -> None:
    passed, largest = ranks.run(export, 1, str(tmp_path / "adapter"))[0]
    assert passed
    assert largest > 0.1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
