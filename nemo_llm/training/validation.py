"""Validation during training: the figures of the task over a fixed set of samples."""

import contextlib
from collections.abc import Iterator

import torch

from nemo_llm.training.state import Measured, TrainingRun
from nemo_llm.training.step import measure, reduce_sums, run_schedule


def validate(run: TrainingRun) -> dict[str, Measured]:
    """Evaluate every validation set on its first ``trainer.val_steps`` global batches.

    The samples are the same on every layout and at every step; neither the training data's place nor the random
    generators move.
    """
    cfg = run.cfg.trainer
    results = {}
    with evaluating(run):
        for name, loader in run.validation.items():
            sums: dict[str, torch.Tensor] = {}
            for batch in range(cfg.val_steps):
                first = batch * cfg.global_batch_size
                if first >= len(loader.source):
                    break
                # Beyond the end of the set the loader gives samples whose loss mask is zero.
                batches = loader.micro_batches(first, cfg.global_batch_size)
                part = reduce_sums(run, run_schedule(run, batches, run.task.forward_step, forward_only=True))
                sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
            results[name] = measure(run.task, {name: value.item() for name, value in sums.items()})
    return results


@contextlib.contextmanager
def evaluating(run: TrainingRun) -> Iterator[None]:
    """Switch dropout off and gradients with it; parameters that are gathered late are gathered first."""
    overlapped = run.cfg.parallelism.overlap_param_gather
    for chunk in run.model:
        if overlapped:
            chunk.disable_forward_pre_hook()
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in run.model:
            chunk.train()
            if overlapped:
                chunk.enable_forward_pre_hook()
