"""Configuration: Hydra composes YAML, one strict decoder turns it into frozen dataclasses, checks find what disagrees.

`nemo_llm.config.compose.load` composes and decodes; the dataclasses are importable from here.
"""

# ruff: noqa: E402, F401 (what is missing is said before the imports that need it; they are for others)

from nemo_llm.environment import require_packages

require_packages(("annotated_types", "hydra", "omegaconf", "pydantic", "yaml"))

from nemo_llm.config.sections.data import DataConfig
from nemo_llm.config.sections.model import ModelConfig, MoeConfig, RopeScaling
from nemo_llm.config.sections.optim import OptimConfig, SchedConfig
from nemo_llm.config.sections.parallelism import ParallelismConfig
from nemo_llm.config.sections.peft import PeftConfig
from nemo_llm.config.sections.precision import Fp8Config, PrecisionConfig
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.config.sections.run_services import CheckpointConfig, ClusterConfig, ExpManagerConfig, SampleConfig
from nemo_llm.config.sections.task import TaskConfig
from nemo_llm.config.sections.trainer import RampupBatchSize, RunSection, TrainerConfig
