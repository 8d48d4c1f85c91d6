"""The values that models and processes are built from: complete where a run makes them, and made without one too."""

import dataclasses
import subprocess
import sys

import pytest

from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.config.sections.model_setting import ModelSetting, RuntimeSetting
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.performance import PerformanceConfig
from nemo_llm.config.sections.precision import PrecisionConfig
from nemo_llm.config.shipped import completed_model, one_cpu, reference_fp32, shipped

_SIZES = {
    "name": "small", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "num_query_groups": 2, "max_position_embeddings": 128,
}  # fmt: skip


def test_a_run_hands_on_all_that_its_model_and_its_processes_depend_on() -> None:
    """Each value here is another than the default of its field, which a field that was forgotten would have."""
    cfg = compose([
        "+model=gpt_tiny", "peft=lora", "parallelism=tp2", "precision=bf16", "performance.fused_kernels=false",
        "data=mock", "data.seq_length=32", "trainer.micro_batch_size=4", "data.reset_attention_mask=true",
        "trainer.seed=7", "trainer.deterministic=true", "trainer.accelerator=cuda", "cluster=h100_infiniband",
        "trainer.first_step_timeout_minutes=3", "task.z_loss_coeff=1e-4",
    ])  # fmt: skip
    sections = {name: getattr(cfg, name) for name in ("model", "parallelism", "precision", "performance", "peft")}
    values = {"seq_length": 32, "micro_batch_size": 4, "reset_attention_mask": True, "z_loss_coeff": 1e-4}
    values |= {"seed": 7, "deterministic": True}
    assert cfg.model_setting == ModelSetting(**sections, **values)
    processes = {"accelerator": "cuda", "timeout_minutes": 3, "environment": cfg.cluster.environment}
    processes |= {"parallelism": cfg.parallelism, "seed": 7, "deterministic": True}
    assert cfg.runtime_setting == RuntimeSetting(**processes)
    for setting in (cfg.model_setting, cfg.runtime_setting):
        for field in dataclasses.fields(setting):
            assert getattr(setting, field.name) != field.default, field.name
    assert cfg.cluster.environment


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_shipped_sections_are_those_that_a_run_composes(dtype: str) -> None:
    cfg = compose(["+model=gpt_tiny", f"precision={dtype}"])
    assert shipped(PrecisionConfig, f"precision/{dtype}") == cfg.precision
    assert shipped(PerformanceConfig, "performance/default") == cfg.performance
    assert shipped(ParallelismConfig, "parallelism/single") == cfg.parallelism


def test_the_reference_is_what_a_run_in_float32_on_one_process_builds() -> None:
    cfg = compose(["+model=moe_tiny", "precision=fp32", "trainer.micro_batch_size=1", "data.seq_length=1024"])
    assert reference_fp32(cfg.model) == dataclasses.replace(cfg.model_setting, seed=0)
    assert one_cpu() == RuntimeSetting(parallelism=cfg.parallelism, accelerator="cpu")


def test_a_model_section_is_completed_with_all_keys_and_keeps_its_own() -> None:
    known = to_dict(compose(["+model=moe_tiny"]))["model"]
    complete = completed_model({**_SIZES, "qk_layernorm": True, "moe": {"num_moe_experts": 8}})
    assert complete.keys() == known.keys()
    assert complete["moe"].keys() == known["moe"].keys()
    assert (complete["qk_layernorm"], complete["moe"]["num_moe_experts"]) == (True, 8)
    assert completed_model(known) == known
    assert completed_model(_SIZES)["moe"] is None


def test_a_setting_is_made_without_hydra_and_without_torch() -> None:
    script = f"""
import sys
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.shipped import completed_model, one_cpu, reference_fp32
setting = reference_fp32(ModelConfig(**completed_model({_SIZES})))
assert setting.model.num_layers == 2 and one_cpu().accelerator == "cpu"
print(sorted({{"hydra", "omegaconf", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
