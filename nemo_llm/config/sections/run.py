"""`RunConfig`: the whole configuration of a training run, as frozen dataclasses."""

from dataclasses import dataclass

from nemo_llm.config.sections.data import DataConfig
from nemo_llm.config.sections.fields import Section
from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.model_setting import ModelSetting, RuntimeSetting
from nemo_llm.config.sections.optim import OptimConfig
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.peft import PeftConfig
from nemo_llm.config.sections.performance import PerformanceConfig
from nemo_llm.config.sections.precision import PrecisionConfig
from nemo_llm.config.sections.run_services import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    ExpManagerConfig,
    SampleConfig,
)
from nemo_llm.config.sections.task import TaskConfig, TokenTask
from nemo_llm.config.sections.trainer import RunSection, TrainerConfig


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

    @property
    def model_setting(self) -> ModelSetting:
        """What the model of this run is built from."""
        return ModelSetting(
            model=self.model,
            parallelism=self.parallelism,
            precision=self.precision,
            performance=self.performance,
            peft=self.peft,
            seq_length=self.data.seq_length,
            micro_batch_size=self.trainer.micro_batch_size,
            reset_attention_mask=self.data.reset_attention_mask,
            z_loss_coeff=self.task.z_loss_coeff if isinstance(self.task, TokenTask) else 0.0,
            seed=self.trainer.seed,
            deterministic=self.trainer.deterministic,
        )

    @property
    def runtime_setting(self) -> RuntimeSetting:
        """What the processes of this run are set up from."""
        return RuntimeSetting(
            parallelism=self.parallelism,
            accelerator=self.trainer.accelerator,
            seed=self.trainer.seed,
            deterministic=self.trainer.deterministic,
            timeout_minutes=self.trainer.first_step_timeout_minutes,
            environment=self.cluster.environment,
        )
