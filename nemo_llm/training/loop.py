"""The life of a run between its first and its last step: steps, log, validation, checkpoints, stop."""

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.errors import ExitCode
from nemo_llm.planner.flops import flops_per_token
from nemo_llm.resilience.phase import StepPhase
from nemo_llm.resilience.stop_signals import StopReason, StopSignals
from nemo_llm.resilience.watchdog import Watchdog, straggler_report
from nemo_llm.run.experiment_loggers import ExperimentLogger, ExperimentRun, start_experiment
from nemo_llm.run.folder import to_plain
from nemo_llm.run.metrics import EvaluationRow, MetricsFile, StepRow, ValidationRow, progress_line
from nemo_llm.run.throughput import Throughput, ThroughputMeter, find_peak
from nemo_llm.training.checkpoint import finish_saving, save_checkpoint
from nemo_llm.training.evaluate_in_loop import read_evaluation
from nemo_llm.training.rollback import BadSteps
from nemo_llm.training.state import Measured, StepResult, TrainingRun
from nemo_llm.training.step import train_step
from nemo_llm.training.validation import validate


@dataclass(frozen=True)
class Ending:
    """How training ended: the exit code, one phrase why, and the last validation."""

    code: ExitCode
    reason: str
    validation: dict[str, Measured]


def train(run: TrainingRun) -> Ending:
    """Take steps until ``trainer.max_steps`` or until told to stop; saves at the end either way."""
    trainer, state = run.cfg.trainer, run.state
    stop_file_folder = run.run_dir if run.runtime.is_first_rank else None
    run.progress.enter(StepPhase.START, state.step)
    evaluation = read_evaluation(run.cfg.evaluation)
    with (
        StopSignals(stop_file_folder, trainer.max_time_minutes) as signals,
        _Report(run) as report,
        Watchdog(run.progress, run.run_dir, run.cfg, signals),
    ):
        reason: StopReason | None = None
        first_step = state.step
        bad_steps = BadSteps(run)
        while state.step < trainer.max_steps and reason is None:
            began, waited = time.perf_counter(), run.loader.wait_seconds
            result = train_step(run)
            run.progress.enter(StepPhase.AGREE, state.step)
            reason = _agree_to_stop(signals, run)  # every rank stops after the same step
            run.progress.enter(StepPhase.REPORT)
            report.step(result, time.perf_counter() - began, run.loader.wait_seconds - waited)
            bad_steps.after(result)
            if state.step == first_step + 1:
                run.runtime.shorten_timeouts(trainer.step_timeout_minutes)
            report.stragglers()
            if _due(trainer.val_interval, state.step) or (reason is None and state.step == trainer.max_steps):
                run.progress.enter(StepPhase.VALIDATION)
                with report.pause():
                    report.validation(validate(run))
            if evaluation is not None and _due(run.cfg.evaluation.interval, state.step):
                run.progress.enter(StepPhase.EVALUATION)
                with report.pause():
                    report.evaluation(evaluation.measure(run))
            if _due(run.cfg.checkpoint.save_interval, state.step) and reason is None:
                run.progress.enter(StepPhase.SAVE)
                with report.pause():
                    save_checkpoint(run, in_background=run.cfg.checkpoint.async_save)
        run.progress.enter(StepPhase.END)
        if run.cfg.checkpoint.save_final or reason is not None:
            save_checkpoint(run)
        finish_saving(run)
        signals.stopped(reason)
    if reason is not None and state.step < trainer.max_steps:
        return Ending(reason.exit_code, reason.detail, report.last_validation)
    return Ending(ExitCode.DONE, f"trainer.max_steps = {trainer.max_steps} reached", report.last_validation)


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _agree_to_stop(signals: StopSignals, run: TrainingRun) -> StopReason | None:
    """The same answer on every rank: a signal may reach one of them a step earlier than the others."""
    reason = signals.poll()
    if run.runtime.world_size == 1:
        return reason
    # A stop file ends a run for good, a notice asks to go on later: where ranks were told both, the latter holds.
    own = 0 if reason is None else 1 if reason.kind == "stop_file" else 2
    told = torch.tensor(own, device=run.runtime.device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    agreed = int(told.item())
    if agreed == own:
        return reason
    return StopReason("stop_file" if agreed == 1 else "signal", "another rank was told to stop", time.time())


class _Report:
    """What a run tells: rows in ``metrics.jsonl``, one line on the terminal, the experiment's loggers.

    Only the first rank writes; the others keep the figures that decide nothing.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.last_validation: dict[str, Measured] = {}
        self._metrics: MetricsFile | None = None
        self._experiment: ExperimentLogger | None = None
        self._has_logged = False
        model = run.cfg.model
        vocab_size = padded_vocab_size(model.vocab_size or run.tokenizer.vocab_size, model.make_vocab_size_divisible_by)
        self._meter = ThroughputMeter(
            flops_per_token=flops_per_token(model, run.cfg.data.seq_length, vocab_size),
            num_devices=run.runtime.world_size,
            peak=find_peak(run.cfg.cluster, run.runtime.device),
            warmup_steps=run.cfg.trainer.warmup_log_steps,
        )

    def __enter__(self) -> "_Report":
        if self.run.runtime.is_first_rank:
            if self.run.state.step < self.run.cfg.trainer.max_steps:
                # Before the first step: a logger that cannot start shows now, and not after it.
                self._experiment = self._start_experiment()
            self._metrics = MetricsFile(self.run.run_dir)
            self._metrics.drop_rows_beyond(self.run.state.step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._experiment is not None:
            self._experiment.close(succeeded=kind is None)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is neither a step nor lost: it counts in the time left, not in the speed."""
        began = time.perf_counter()
        yield
        self._meter.record_pause(time.perf_counter() - began)

    def step(self, result: StepResult, seconds: float, data_wait_seconds: float) -> None:
        """Take in one step; on its interval, log it."""
        run, state = self.run, self.run.state
        trainer, ramp, length = run.cfg.trainer, run.ramp, run.cfg.data.seq_length
        positions = ramp.global_batch_size(state.step) * length
        self._meter.record_step(positions, result.num_tokens, seconds, data_wait_seconds)
        if self._metrics is None or not (
            not self._has_logged or _due(trainer.log_interval, state.step) or state.step == trainer.max_steps
        ):
            return
        samples_left = ramp.consumed_samples(trainer.max_steps) - ramp.consumed_samples(state.step)
        speed = self._meter.report(samples_left * length)
        row = StepRow(
            step=state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            learned_tokens=result.num_tokens,
            step_time_seconds=speed.step_time_seconds,
            tokens_per_second=speed.tokens_per_second,
            learned_tokens_per_second=speed.learned_tokens_per_second,
            tflops_per_device=speed.tflops_per_device,
            skipped=result.skipped,
        )
        self._metrics.append(row, result.figures)
        self._show(row, speed)
        self._has_logged = True
        if self._experiment is not None:
            named = {f"train/{name}": value for name, value in result.figures.items()}
            self._experiment.log_metrics(row.step, _figures(row, speed) | named)

    def stragglers(self) -> None:
        """On its interval, a line on the slowest ranks; a collective."""
        interval, step = self.run.cfg.trainer.straggler_interval, self.run.state.step
        if interval is not None and step % interval == 0:
            line = straggler_report(self.run.progress.take_seconds(), interval)
            if self._metrics is not None:
                print(line, flush=True)

    def _show(self, row: StepRow, speed: Throughput) -> None:
        val_loss = next((result.loss for result in self.last_validation.values()), None)
        memory = peak_memory_gib(self.run.runtime.device)
        total = self.run.cfg.trainer.max_steps
        print(progress_line(row, speed, total_steps=total, val_loss=val_loss, memory_gib=memory), flush=True)

    def validation(self, results: dict[str, Measured]) -> None:
        """Log the result of each validation set."""
        self.last_validation = results
        self.run.state.validation_loss = next((result.loss for result in results.values()), None)
        if self._metrics is None:
            return
        step = self.run.state.step
        for name, result in results.items():
            accuracy = result.figures.get("accuracy")
            row = ValidationRow(step=step, val_loss=result.loss, val_accuracy=accuracy, val_name=name)
            self._metrics.append(row, {f"val_{figure}": value for figure, value in result.figures.items()})
            print(f"validation {name}: {self.run.task.describe(result.figures, result.num_tokens)}", flush=True)
            if self._experiment is not None:
                named = {f"val/{name}/{figure}": value for figure, value in result.figures.items()}
                self._experiment.log_metrics(step, named)

    def evaluation(self, figures: dict[str, float]) -> None:
        """Log what tasks and texts gave."""
        step = self.run.state.step
        if self._metrics is None:
            return
        for name, value in figures.items():
            self._metrics.append(EvaluationRow(step=step, eval_name=name, eval_value=value))
        print("evaluation: " + " | ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        if self._experiment is not None:
            self._experiment.log_metrics(step, {f"eval/{name}": value for name, value in figures.items()})

    def _start_experiment(self) -> ExperimentLogger:
        run = self.run
        experiment = start_experiment(
            run.cfg.exp_manager,
            ExperimentRun(run.run_dir, run.cfg.run.name, 0, run.cfg.trainer.max_steps, run.state.step),
        )
        experiment.log_config(to_plain(run.cfg))
        return experiment


def _figures(row: StepRow, speed: Throughput) -> dict[str, float | None]:
    """Names as the loggers show them."""
    return {
        "train/grad_norm": row.grad_norm,
        "train/learning_rate": row.learning_rate,
        "speed/tokens_per_second": row.tokens_per_second,
        "speed/learned_tokens_per_second": row.learned_tokens_per_second,
        "speed/tflops_per_device": row.tflops_per_device,
        "speed/mfu_causal": speed.mfu_causal,
        "speed/data_wait_fraction": speed.data_wait_fraction,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of the CUDA allocator, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
