"""`RunConfig`: the whole configuration of a training run, as frozen dataclasses."""

from dataclasses import dataclass

from nemo_llm.config.data import DataConfig
from nemo_llm.config.model import ModelConfig
from nemo_llm.config.optim import OptimConfig
from nemo_llm.config.parallelism import ParallelismConfig
from nemo_llm.config.peft import PeftConfig
from nemo_llm.config.performance import PerformanceConfig
from nemo_llm.config.precision import PrecisionConfig
from nemo_llm.config.section import Section
from nemo_llm.config.sections.task import TaskConfig
from nemo_llm.config.services import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    ExpManagerConfig,
    SampleConfig,
)
from nemo_llm.config.trainer import RunSection, TrainerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Section):
    """A whole run. Values come from ``conf/`` and the command line alone; no field has a default of its own."""

    run: RunSection
    trainer: TrainerConfig
    model: ModelConfig
    parallelism: ParallelismConfig
    precision: PrecisionConfig
    performance: PerformanceConfig
    optim: OptimConfig
    data: DataConfig
    task: TaskConfig
    checkpoint: CheckpointConfig
    exp_manager: ExpManagerConfig
    cluster: ClusterConfig
    sample: SampleConfig
    evaluation: EvaluationConfig
    peft: PeftConfig | None
