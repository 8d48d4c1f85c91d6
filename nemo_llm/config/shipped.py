"""Sections as files below ``conf/`` have them, read without Hydra, and the settings of models that no run trains."""

from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from nemo_llm.config.compose.catalog import conf_dir
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.model_setting import ModelSetting, RuntimeSetting
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.peft import PeftMethod
from nemo_llm.config.sections.performance import PerformanceConfig
from nemo_llm.config.sections.precision import PrecisionConfig

T = TypeVar("T")


def read_shipped(name: str) -> dict[str, Any]:
    """The values in a file that stands alone, such as ``precision/fp32``."""
    values: dict[str, Any] = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def shipped(section: type[T], name: str) -> T:
    """The same as a section, which must have none within it."""
    return section(**read_shipped(name))


def completed_model(section: Mapping[str, Any]) -> dict[str, Any]:
    """A model section with all keys: those that it lacks have the values that change nothing (``model/family``)."""
    moe = section.get("moe")
    complete = {**read_shipped("model/family/llama"), **section}
    return complete if moe is None else {**complete, "moe": {**read_shipped("model/family/moe"), **moe}}


def reference_fp32(model: ModelConfig, peft: PeftMethod | None = None) -> ModelSetting:
    """The model in float32 on one process: what others are compared with, and what weights are changed in."""
    return ModelSetting(
        model=model,
        parallelism=shipped(ParallelismConfig, "parallelism/single"),
        precision=shipped(PrecisionConfig, "precision/fp32"),
        performance=shipped(PerformanceConfig, "performance/default"),
        seq_length=model.max_position_embeddings,
        peft=peft,
    )


def one_cpu() -> RuntimeSetting:
    """This process alone, on its CPU."""
    return RuntimeSetting(parallelism=shipped(ParallelismConfig, "parallelism/single"))
