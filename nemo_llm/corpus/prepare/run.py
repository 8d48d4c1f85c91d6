"""Runs the stages of a plan, here or on Slurm, and goes on with an interrupted run."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from nemo_llm.corpus.prepare.counts import StepCounts, check_stage
from nemo_llm.corpus.prepare.pipeline import build_steps
from nemo_llm.corpus.prepare.plan import PreparePlan, PrepareStage
from nemo_llm.corpus.prepare.publish import published
from nemo_llm.errors import InputError
from nemo_llm.processes import worker_pool
from nemo_llm.storage.locks import flock
from nemo_llm.storage.unfinished_work import one_at_a_time, open_work

_LOCK = "workers.lock"


@dataclass(frozen=True, slots=True)
class HowToRun:
    """What does not change the result."""

    workers: int
    overwrite: bool
    restart: bool
    slurm: dict[str, Any] | None
    """Arguments of datatrove's Slurm executor; None: run here."""


OnProgress = Callable[[str, int, int], None]


def prepare(plan: PreparePlan, how: HowToRun, on_progress: OnProgress) -> dict[str, Any] | None:
    """Run what is not done yet and return the report; None when jobs were handed to Slurm instead.

    Raises InputError for inputs, settings and folders that do not serve, and NemoLlmError when a worker was killed; in
    both cases what was done stays and the same command goes on from there.
    """
    with one_at_a_time("output", plan.output, how.workers):
        report = published(plan)
        if report is None:
            empty = plan.output.is_dir() and not any(plan.output.iterdir())
            if plan.output.exists() and not empty and not how.overwrite:
                raise InputError(
                    f"output = {plan.output}: exists already, made from other inputs or settings; pass overwrite=true "
                    "to replace it, or choose another folder"
                )
            open_work(plan.work, plan.identity(), how.restart)
            if how.slurm is not None:
                _submit(plan, how.slurm)
                return None
            _run_here(plan, how.workers, on_progress)
            report = published(plan)
            assert report is not None
        if plan.work.exists():
            shutil.rmtree(plan.work)
        return report


def _run_here(plan: PreparePlan, workers: int, on_progress: OnProgress) -> None:
    with (plan.work / _LOCK).open("w") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX)  # waits for workers of a killed run to be gone
    with contextlib.ExitStack() as stack:
        pool = None
        if workers:
            workers = min(workers, max(stage.tasks for stage in plan.stages()))
            pool = worker_pool(workers, _start_worker, plan)
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        steps: list[StepCounts] = []
        for stage in plan.stages():
            todo = _executor(plan, stage).get_incomplete_ranks()
            on_progress(stage.name, stage.tasks - len(todo), stage.tasks)
            if pool is None:
                for done, rank in enumerate(todo, start=stage.tasks - len(todo) + 1):
                    _run_task(plan, stage, rank)
                    on_progress(stage.name, done, stage.tasks)
            else:
                futures = [pool.submit(_run_task, plan, stage, rank) for rank in todo]
                for done, future in enumerate(as_completed(futures), start=stage.tasks - len(todo) + 1):
                    future.result()
                    on_progress(stage.name, done, stage.tasks)
            if stage.name != "publish":
                steps += check_stage(plan, stage, steps)


def _executor(plan: PreparePlan, stage: PrepareStage) -> LocalPipelineExecutor:
    steps = build_steps(plan, stage.name)
    return LocalPipelineExecutor(steps, tasks=stage.tasks, workers=1, logging_dir=str(plan.logs(stage.name)))


def _run_task(plan: PreparePlan, stage: PrepareStage, rank: int) -> None:
    # The private _run_for_rank is what every executor of datatrove 0.10.1 calls for a task. Its own run() hands tasks
    # to a multiprocessing pool, which waits for ever when a worker is killed. A local rank other than 0 keeps the log
    # out of the terminal; its errors, which go there all the same, come to us as exceptions.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        _executor(plan, stage)._run_for_rank(rank, local_rank=1)


def _start_worker(plan: PreparePlan) -> None:
    """Prepare a worker process, which holds a lock that a rerun waits for."""
    lock = os.open(plan.work / _LOCK, os.O_RDWR | os.O_CREAT)
    flock(lock, fcntl.LOCK_SH)  # never closed: it goes with the process


def _submit(plan: PreparePlan, arguments: dict[str, Any]) -> None:
    """Hand one array job for each stage to Slurm, each waiting for the one before."""
    if not arguments["partition"]:
        raise InputError("slurm.partition = null: name the partition that jobs run in: slurm.partition=NAME")
    here = f"export PATH={Path(sys.executable).parent}:$PATH"
    arguments = arguments | {"env_command": arguments["env_command"] or here}
    last = None
    for stage in plan.stages():
        names = {"job_name": f"prepare-{stage.name}", "logging_dir": str(plan.logs(stage.name))}
        try:
            last = SlurmPipelineExecutor(
                build_steps(plan, stage.name), tasks=stage.tasks, depends=last, **(arguments | names)
            )
        except TypeError as error:
            raise InputError(f"slurm = {arguments}: {error}; the keys are SlurmPipelineExecutor's arguments") from error
    assert last is not None
    try:
        last.run()
    except FileNotFoundError as error:
        raise InputError("executor = slurm: there is no sbatch here; run on a login node, or executor=local") from error
