"""What a training run is made of, and what moves while it goes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_llm.config import RunConfig
from nemo_llm.config.sections.batch_ramp import BatchRamp
from nemo_llm.data.build import DataSets
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.resilience.phase import RunProgress
from nemo_llm.tasks import Task
from nemo_llm.tokenizers.tokenizer import Tokenizer
from nemo_llm.training.batches import DeviceBatches


@dataclass
class TrainState:
    """Progress of a run. Data order, learning rate and random numbers follow from it and the configuration alone."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    recent: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, loss, gradient norm) of the last good steps: what a spike is told by, and a resumed run shows."""
    validation_loss: float | None = None
    """Of the last validation, on its first set."""


@dataclass(frozen=True)
class Measured:
    """What the task makes of its sums over a global batch or a validation set; the same on every rank."""

    figures: dict[str, float]
    """By the names of ``metrics.jsonl``."""
    num_tokens: int
    """Learned tokens: those with a loss."""

    @property
    def loss(self) -> float:
        """Of all figures the one that every task has."""
        return self.figures["loss"]


@dataclass(frozen=True)
class StepResult(Measured):
    """One optimizer update; the norm is before clipping."""

    grad_norm: float
    learning_rate: float
    skipped: bool
    bad: Any = None
    """`bad_steps.BadStep` when the update was not made for what the step computed."""


@dataclass
class TrainingRun:
    """Every object of a run; nothing is looked up elsewhere."""

    cfg: RunConfig
    runtime: ParallelRuntime
    model: list[Any]
    optimizer: Any
    forward_backward: Callable[..., list[dict[str, torch.Tensor]]]
    task: Task
    data: DataSets
    loader: DeviceBatches
    validation: dict[str, DeviceBatches]
    tokenizer: Tokenizer
    ramp: BatchRamp
    state: TrainState
    sum_names: dict[bool, list[str]] = field(default_factory=dict)  # of the task, in evaluation and in training
    progress: RunProgress = field(default_factory=RunProgress)
    saver: Any = None  # training.checkpoint makes it at the first save
    base_fingerprint: str = ""  # of the frozen weights, with peft
    run_dir: Path = Path()  # closing.open_run names it, once everything else could be built
