"""The sections around the training loop: checkpoints, experiment manager, cluster, closing sample."""

from dataclasses import dataclass
from typing import Any, Literal

from nemo_llm.config.sections.fields import (
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PathStr,
    PositiveFloat,
    PositiveInt,
    Section,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    """When to save, what to keep, where to resume from (`auto`, `never` or a path) or to take first weights from."""

    save_interval: PositiveInt | None
    save_final: bool
    keep_last: PositiveInt | None
    keep_every: PositiveInt | None
    keep_best: PositiveInt | None
    async_save: bool
    writer_threads: PositiveInt
    resume: PathStr
    init_from: PathStr | None
    verify: Literal["full", "sampled", "sizes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpManagerConfig(Section):
    """NeMo's experiment manager: logs and loggers in our run folder. With `enabled: false` NeMo is not imported."""

    enabled: bool
    create_tensorboard_logger: bool
    create_wandb_logger: bool
    wandb_logger_kwargs: dict[str, Any]
    create_mlflow_logger: bool
    mlflow_logger_kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Section):
    """The machine, for the memory estimate, the peak that MFU is measured against (dense bf16), and its network."""

    name: NonEmptyStr
    gpu_name: str | None
    gpu_memory_gib: PositiveFloat | None
    peak_tflops: PositiveFloat | None
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(Section):
    """Tasks and texts that are measured while a model trains."""

    interval: PositiveInt | None
    tasks: dict[str, PathStr | list[PathStr]]
    task_shots: dict[str, PathStr]
    num_fewshot: NonNegativeInt | None
    texts: PathStr | list[PathStr] | None
    limit: PositiveInt | None
    timeout_minutes: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig(Section):
    """Text generated from the last checkpoint and printed when a run is done."""

    enabled: bool
    prompt: str
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt | None
