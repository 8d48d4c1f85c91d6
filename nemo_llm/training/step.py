"""One training step, from the global batch to the optimizer's update. Read this file first."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from nemo_llm.config.sections.optim import learning_rate
from nemo_llm.megatron.optimizer import forget_gradients, update_weights
from nemo_llm.resilience.phase import StepPhase
from nemo_llm.tasks import Task
from nemo_llm.training.bad_steps import BadStep, diagnose, find_reason, record, remember
from nemo_llm.training.state import Measured, StepResult, TrainingRun


def train_step(run: TrainingRun) -> StepResult:
    """Take one global batch, update the weights once, advance ``run.state``."""
    cfg, state = run.cfg, run.state
    samples = run.ramp.global_batch_size(state.step + 1)
    set_hyperparameters(run, lr := learning_rate(state.step + 1, cfg.optim.lr, cfg.optim.sched))

    # 1. and 2. Gradients of the global batch, and its figures for the log.
    run.progress.enter(StepPhase.DATA, state.step)
    batches = run.loader.micro_batches(state.consumed_samples, samples)
    run.progress.enter(StepPhase.FORWARD_BACKWARD)
    measured, denominator = forward_backward(run, batches)

    # 3. Clip and update, unless loss or gradient norm say that it would do harm; once a checkpoint of the weights as
    #    they are is copied. Megatron refuses the update when fp16 gradients overflow.
    run.progress.enter(StepPhase.UPDATE)
    if run.saver is not None:
        run.saver.copied()
    updated, grad_norm = _update_if_good(run, measured.loss, denominator)
    bad = None
    if reason := find_reason(run, measured.loss, grad_norm):
        before = (measured.loss, grad_norm)
        measured, denominator = forward_backward(run, batches)  # once more, to tell hardware from data
        updated, grad_norm = _update_if_good(run, measured.loss, denominator)
        again = (measured.loss, grad_norm)
        bad = BadStep(reason, diagnose(before, again, find_reason(run, *again)))
        record(run, bad, before, (state.consumed_samples, state.consumed_samples + samples))

    state.step += 1
    state.consumed_samples += samples
    state.consumed_tokens += samples * cfg.data.seq_length
    if updated:
        remember(run, measured.loss, grad_norm)
    shown = None if updated else bad
    return StepResult(measured.figures, measured.num_tokens, float(grad_norm or 0.0), lr, not updated, shown)


def forward_backward(run: TrainingRun, batches: list[dict[str, torch.Tensor]]) -> tuple[Measured, float]:
    """Fill the gradient buffers from these micro-batches; returns what was measured, and what divides the gradient."""
    seed_dropout(run)
    # 1. Forget the gradients of the step before.
    for chunk in run.model:
        forget_gradients(chunk)
    run.optimizer.zero_grad()

    # 2. Forward and backward over the micro-batches, by Megatron's schedule for this pipeline. Each micro-batch gave
    #    *sums*. At the end of the schedule the gradients are summed over micro-batches and data-parallel ranks. The
    #    optimizer divides them by the task's denominator over the global batch (the number of tokens, say): the
    #    gradient of the mean, whatever the layout.
    sums = reduce_sums(run, run_schedule(run, batches, run.task.forward_step, forward_only=False))
    denominator = run.task.denominator(sums).to(sums["tokens"])
    *values, divided_by = torch.stack([*sums.values(), denominator]).tolist()
    return measure(run.task, dict(zip(sums, values, strict=True))), divided_by


def measure(task: Task, sums: dict[str, float]) -> Measured:
    """The task's figures of these sums, and the number of learned tokens."""
    return Measured(task.figures(sums), int(sums["tokens"]))


def _update_if_good(run: TrainingRun, loss: float, denominator: float) -> tuple[bool, float | None]:
    return update_weights(run.optimizer, denominator, lambda norm: find_reason(run, loss, norm) is None)


def run_schedule(
    run: TrainingRun, batches: list[dict[str, torch.Tensor]], forward_step: Callable[..., Any], **settings: bool
) -> list[Any]:
    """Run the micro-batches through the pipeline; on the last stage the result holds what each one gave.

    Args:
        settings: of Megatron's schedules, ``forward_only`` above all.
    """
    # Each virtual stage draws the same micro-batches from an iterator of its own.
    iterators = [iter(batches) for _ in run.model]
    return run.forward_backward(
        forward_step_func=forward_step,
        data_iterator=iterators if len(run.model) > 1 else iterators[0],
        model=run.model if len(run.model) > 1 else run.model[0],
        num_microbatches=len(batches),
        seq_length=run.cfg.data.seq_length,
        micro_batch_size=len(batches[0]["tokens"]),
        **settings,
    )


def reduce_sums(run: TrainingRun, outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The task's named sums over the global batch, float64, on every rank.

    The last pipeline stage sums over its micro-batches and over data- and context-parallel ranks, then tells the
    other stages.
    """
    runtime, names = run.runtime, _sum_names(run, outputs)
    sums = torch.zeros(len(names), dtype=torch.float64, device=runtime.device)
    if runtime.is_last_pipeline_stage:
        sums = torch.stack([torch.stack([output[name] for name in names]).double() for output in outputs]).sum(0)
        dist.all_reduce(sums, group=runtime.groups.dp_cp)
    if dist.get_world_size(runtime.groups.pp) > 1:
        dist.broadcast(sums, src=runtime.last_stage_rank, group=runtime.groups.pp)
    return dict(zip(names, sums.unbind(), strict=True))


def _sum_names(run: TrainingRun, outputs: list[dict[str, torch.Tensor]]) -> list[str]:
    """Names of the sums, which the stages without a loss are told once in training and once in evaluation."""
    training = run.model[0].training
    if training not in run.sum_names:
        names = [list(outputs[0]) if outputs else []]
        if dist.get_world_size(run.runtime.groups.pp) > 1:
            dist.broadcast_object_list(names, src=run.runtime.last_stage_rank, group=run.runtime.groups.pp)
        run.sum_names[training] = names[0]
    return run.sum_names[training]


def set_hyperparameters(run: TrainingRun, lr: float) -> None:
    """Write learning rate and weight decay into every parameter group; neither is ever read back from a checkpoint."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = run.cfg.optim.weight_decay * group["wd_mult"]


def seed_dropout(run: TrainingRun) -> None:
    """Seed the generators from (seed, step, place), so that a resumed step drops the same activations."""
    model, runtime = run.cfg.model, run.runtime
    adapters_drop = run.cfg.peft is not None and run.cfg.peft.dropout > 0.0
    if model.hidden_dropout == 0.0 and model.attention_dropout == 0.0 and not adapters_drop:
        return
    key = (run.cfg.trainer.seed, run.state.step, runtime.dp_rank, runtime.cp_rank, runtime.pp_rank)
    seed = zlib.crc32(repr(key).encode()) >> 1
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
