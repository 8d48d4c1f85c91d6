"""Tasks and texts measured while a model trains, on its own layout and without a trace in what follows."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_llm.config.sections.run_services import EvaluationConfig
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.evaluation.harness import TaskFile, find_task_files, run_tasks
from nemo_llm.evaluation.perplexity import measure_perplexity
from nemo_llm.evaluation.suite import read_texts
from nemo_llm.models.layers.context_parallel import take_local_chunks
from nemo_llm.tasks.base import token_losses
from nemo_llm.training.state import TrainingRun
from nemo_llm.training.step import run_schedule
from nemo_llm.training.validation import evaluating

_GENERATED = ("gsm8k",)


@dataclass(frozen=True)
class InLoopEvaluation:
    """What to measure, read before training starts."""

    cfg: EvaluationConfig
    tasks: list[TaskFile]
    texts: dict[str, list[str]]

    def measure(self, run: TrainingRun) -> dict[str, float]:
        """Every figure by its name, the same on every rank; random generators are put back as they were."""
        with evaluating(run), kept_random_state():
            scorer = TrainingScorer(run)
            figures: dict[str, float] = {}
            for name, documents in self.texts.items():
                figures[f"{name}/bits_per_byte"] = measure_perplexity(scorer, name, documents).bits_per_byte
            if self.tasks:
                for task, values in run_tasks(scorer, self.tasks, self.cfg.limit, self.cfg.num_fewshot).items():
                    named = {key.partition(",")[0]: value for key, value in values.items()}
                    shown = {key: value for key, value in named.items() if key != "samples" and "_stderr" not in key}
                    figures |= {f"{task}/{key}": float(value) for key, value in shown.items()}
        return figures


def read_evaluation(cfg: EvaluationConfig) -> InLoopEvaluation | None:
    """Read the files of ``evaluation``; None where nothing is asked for.

    Raises:
        ConfigError: an interval without anything to measure, or a task that generates.
        InputError: a file that is missing or cannot be used.
    """
    if cfg.interval is None:
        return None
    if not cfg.tasks and cfg.texts is None:
        rule = "nothing to measure: evaluation.tasks and evaluation.texts are empty"
        raise ConfigError(
            [Problem("evaluation.interval", cfg.interval, rule, "set null, or add evaluation.texts=FILE")]
        )
    if generated := [kind for kind in cfg.tasks if kind in _GENERATED]:
        rule = f"{generated[0]} generates text, which is slow while training"
        raise ConfigError([Problem("evaluation.tasks", generated[0], rule, "use python -m nemo_llm.evaluate for it")])
    return InLoopEvaluation(cfg, find_task_files(cfg.tasks, cfg.task_shots), read_texts(cfg.texts, "text", cfg.limit))


class TrainingScorer:
    """Scores texts with the model in training, through the pipeline schedule that trains it."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.tokenizer = run.tokenizer
        self.max_length = run.cfg.data.seq_length
        self.classes: tuple[str, ...] = ()

    def score(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it; a collective of all ranks."""
        runtime = self.run.runtime
        size = self.run.cfg.trainer.micro_batch_size
        # Every data-parallel rank takes its share, the same number of micro-batches each: experts are called together.
        share = range(runtime.dp_rank, len(requests), runtime.dp_size)
        longest_share = -(-len(requests) // runtime.dp_size)
        count = max(1, -(-longest_share // size))
        stages = dist.get_world_size(runtime.groups.pp)
        count = -(-count // stages) * stages  # what an interleaved pipeline asks for
        rows = [list(share)[at : at + size] for at in range(0, count * size, size)]
        batches = [self._micro_batch([requests[number] for number in part], size) for part in rows]
        outputs = run_schedule(self.run, batches, _forward_step, forward_only=True, collect_non_loss_data=True)
        results = torch.zeros(len(requests), 2, dtype=torch.float64, device=runtime.device)
        if runtime.is_last_pipeline_stage and runtime.tp_rank == 0:
            for part, (losses, hits, mask) in zip(rows, outputs, strict=True):
                for row, number in enumerate(part):
                    results[number, 0] = -(losses[row].double() * mask[row]).sum()
                    results[number, 1] = ((1 - hits[row].double()) * mask[row]).sum()
        dist.all_reduce(results)  # context-parallel ranks hold parts of a text, data-parallel ones other texts
        return [(value, misses == 0) for value, misses in results.tolist()]

    def generate(self, *_: Any, **_settings: Any) -> list[str]:
        """Not while training: `read_evaluation` refuses tasks that need it."""
        raise AssertionError("generation in the loop")

    def classify(self, *_: Any) -> list[list[float]]:
        """Not while training: validation gives loss and accuracy of a head."""
        raise AssertionError("a head in the loop")

    def _micro_batch(self, requests: Sequence[tuple[list[int], list[int]]], size: int) -> dict[str, torch.Tensor]:
        """[size, seq_length], padded with rows and tokens that count for nothing, cut for context parallelism."""
        runtime, length = self.run.runtime, self.max_length
        tokens = torch.zeros(size, length, dtype=torch.int64)
        labels = torch.zeros(size, length, dtype=torch.int64)
        mask = torch.zeros(size, length)
        for row, (context, continuation) in enumerate(requests):
            whole = torch.tensor([*context, *continuation][-(length + 1) :])
            filled = len(whole) - 1
            scored = min(len(continuation), filled)
            tokens[row, :filled], labels[row, :filled] = whole[:-1], whole[1:]
            mask[row, filled - scored : filled] = 1
        arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask}
        arrays["position_ids"] = torch.arange(length).expand(size, length)
        cp = runtime.parallelism.context_parallel_size
        return {
            name: take_local_chunks(array.to(runtime.device), runtime.cp_rank, cp, dim=1)
            for name, array in arrays.items()
        }


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    # In evaluation the output is [2, b, s/cp]: losses and hits.
    return token_losses(batch, model), lambda losses, **_: (losses[0], losses[1], batch["loss_mask"])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Put back the random generators of Python, NumPy and PyTorch: lm-eval seeds them all."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)
