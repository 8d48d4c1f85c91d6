"""The seam between a run and its model: frozen values that hold all that models and process groups depend on.

A run makes them of its sections (`RunConfig.model_setting`, `RunConfig.runtime_setting`). Inference and conversions,
which have a model and no run, make their own (`nemo_llm.config.shipped`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.peft import PeftConfig
from nemo_llm.config.sections.performance import PerformanceConfig
from nemo_llm.config.sections.precision import PrecisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSetting:
    """All that the construction of a model depends on, adapters included; the defaults stand for a model without a run.

    Attributes:
        seq_length, micro_batch_size: shape of a micro-batch, in tokens and samples.
        reset_attention_mask: whether a sample holds several documents that do not see each other.
        z_loss_coeff: weight of the squared log-partition in the loss (`TokenTask`).
        seed: of the initial weights.
        deterministic: whether only operations that repeat bit by bit are chosen.
    """

    model: ModelConfig
    parallelism: ParallelismConfig
    precision: PrecisionConfig
    performance: PerformanceConfig
    seq_length: int
    micro_batch_size: int = 1
    reset_attention_mask: bool = False
    peft: PeftConfig | None = None
    z_loss_coeff: float = 0.0
    seed: int = 0
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSetting:
    """All that a process' device and its process groups depend on; the defaults stand for processes without a run.

    Attributes:
        timeout_minutes: of every process group, until the first step is over.
        environment: variables for CUDA and NCCL; the user's own win.
    """

    parallelism: ParallelismConfig
    accelerator: Literal["auto", "cpu", "cuda"] = "cpu"
    seed: int = 0
    deterministic: bool = False
    timeout_minutes: float = 30.0
    environment: Mapping[str, str] = field(default_factory=dict)
