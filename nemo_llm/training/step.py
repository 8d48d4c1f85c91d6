"""One training step, from the global batch to the optimizer's update. Read this file first."""

import zlib

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from nemo_llm.config.sections.peft import LoraConfig
from nemo_llm.optim.gradients import forget_gradients
from nemo_llm.optim.schedule import learning_rate
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.resilience.phase import StepPhase
from nemo_llm.training.bad_steps import BadStep, diagnose, find_reason, record, remember, update_weights
from nemo_llm.training.state import StepResult, TrainingRun


def train_step(run: TrainingRun) -> StepResult:
    """Take one global batch, update the weights once, advance ``run.state``."""
    cfg, state = run.cfg, run.state
    samples = run.ramp.global_batch_size(state.step + 1)
    set_hyperparameters(run, lr := learning_rate(state.step + 1, cfg.optim.lr, cfg.optim.sched))

    # 1. and 2. Gradients of the global batch, and its loss for the log.
    run.progress.enter(StepPhase.DATA, state.step)
    batches = run.loader.micro_batches(state.consumed_samples, samples)
    run.progress.enter(StepPhase.FORWARD_BACKWARD)
    loss, num_tokens = forward_backward(run, batches)

    # 3. Clip and update, unless loss or gradient norm say that it would do harm; once a checkpoint of the weights as
    #    they are is copied. Megatron refuses the update when fp16 gradients overflow.
    run.progress.enter(StepPhase.UPDATE)
    if run.saver is not None:
        run.saver.copied()
    updated, grad_norm = update_weights(run.optimizer, num_tokens, lambda norm: find_reason(run, loss, norm) is None)
    bad = None
    if reason := find_reason(run, loss, grad_norm):
        before = (loss, grad_norm)
        updated, (loss, grad_norm), diagnosis = _run_again(run, batches, before)
        bad = BadStep(reason, diagnosis)
        record(run, bad, before, (state.consumed_samples, state.consumed_samples + samples))

    state.step += 1
    state.consumed_samples += samples
    state.consumed_tokens += samples * cfg.data.seq_length
    if updated:
        remember(run, loss, grad_norm)
    return StepResult(loss, float(grad_norm or 0.0), lr, num_tokens, not updated, None if updated else bad)


def forward_backward(run: TrainingRun, batches: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Fill the gradient buffers from these micro-batches; returns the loss per token and the number of tokens."""
    seed_dropout(run)
    # 1. Forget the gradients of the step before.
    for chunk in run.model:
        forget_gradients(chunk)
    run.optimizer.zero_grad()

    # 2. Forward and backward over the micro-batches, by Megatron's schedule for this pipeline. Each micro-batch gave
    #    the *sum* of its token losses. At the end of the schedule the gradients are summed over micro-batches and
    #    data-parallel ranks. The optimizer divides them by the number of tokens in the global batch: the gradient of
    #    the mean loss per token, whatever the layout.
    outputs = run_schedule(run, batches, forward_only=False)
    loss_sum, num_tokens, _ = reduce_sums(outputs, run.runtime)
    return loss_sum / max(num_tokens, 1), int(num_tokens)


def _run_again(
    run: TrainingRun, batches: list[dict[str, torch.Tensor]], before: tuple[float, float | None]
) -> tuple[bool, tuple[float, float | None], str]:
    """The same step once more: (whether it was good and updated the weights, its loss and norm, what that says)."""
    loss, num_tokens = forward_backward(run, batches)
    updated, norm = update_weights(run.optimizer, num_tokens, lambda norm: find_reason(run, loss, norm) is None)
    return updated, (loss, norm), diagnose(before, (loss, norm), find_reason(run, loss, norm))


def run_schedule(run: TrainingRun, batches: list[dict[str, torch.Tensor]], forward_only: bool) -> list:
    """Run the micro-batches through the pipeline; on the last stage the result holds each one's sums."""
    # Each virtual stage draws the same micro-batches from an iterator of its own.
    iterators = [iter(batches) for _ in run.model]
    return run.forward_backward(
        forward_step_func=run.forward_step,
        data_iterator=iterators if len(run.model) > 1 else iterators[0],
        model=run.model if len(run.model) > 1 else run.model[0],
        num_microbatches=len(batches),
        seq_length=run.cfg.data.seq_length,
        micro_batch_size=run.cfg.trainer.micro_batch_size,
        forward_only=forward_only,
    )


def reduce_sums(outputs: list[dict[str, torch.Tensor]], runtime: ParallelRuntime) -> list[float]:
    """``[loss, tokens, hits]`` over the global batch, on every rank.

    The last pipeline stage sums over its micro-batches and over data- and context-parallel ranks, then tells the
    other stages.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    if runtime.is_last_pipeline_stage:
        sums = torch.stack([output["sums"] for output in outputs]).sum(0)
        dist.all_reduce(sums, group=runtime.groups.dp_cp)
    if dist.get_world_size(runtime.groups.pp) > 1:
        dist.broadcast(sums, src=runtime.last_stage_rank, group=runtime.groups.pp)
    return sums.tolist()


def set_hyperparameters(run: TrainingRun, lr: float) -> None:
    """Write learning rate and weight decay into every parameter group; neither is ever read back from a checkpoint."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = run.cfg.optim.weight_decay * group["wd_mult"]


def seed_dropout(run: TrainingRun) -> None:
    """Seed the generators from (seed, step, place), so that a resumed step drops the same activations."""
    model, runtime = run.cfg.model, run.runtime
    adapters_drop = isinstance(run.cfg.peft, LoraConfig) and run.cfg.peft.dropout > 0.0
    if model.hidden_dropout == 0.0 and model.attention_dropout == 0.0 and not adapters_drop:
        return
    key = (run.cfg.trainer.seed, run.state.step, runtime.dp_rank, runtime.cp_rank, runtime.pp_rank)
    seed = zlib.crc32(repr(key).encode()) >> 1
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
