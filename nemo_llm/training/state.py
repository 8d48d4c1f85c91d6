"""What a training run is made of, and what moves while it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_llm.config import RunConfig
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.training.batch_ramp import BatchRamp


@dataclass
class TrainState:
    """Progress of a run. Data order, learning rate and random numbers follow from it and the configuration alone."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer update. The loss is the mean over the tokens of the global batch; the norm is before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    skipped: bool


class BatchLoader(Protocol):
    """Gives the micro-batches of one global batch to this data-parallel rank."""

    def micro_batches(self, first_sample: int, num_samples: int) -> list[dict[str, torch.Tensor]]: ...


@dataclass
class TrainingRun:
    """Every object of a run; nothing is looked up elsewhere."""

    cfg: RunConfig
    runtime: ParallelRuntime
    run_dir: Path
    model: list[Any]
    optimizer: Any
    forward_backward: Callable[..., list[dict[str, torch.Tensor]]]
    forward_step: Callable[..., Any]
    loader: BatchLoader
    validation: dict[str, BatchLoader]
    tokenizer: Any
    ramp: BatchRamp
    state: TrainState
