"""Runs the stages of a plan, here or on Slurm, and goes on with an interrupted run."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from nemo_llm.corpus.prepare.counts import StepCounts, check_stage
from nemo_llm.corpus.prepare.pipeline import build_steps
from nemo_llm.corpus.prepare.plan import PreparePlan, Stage
from nemo_llm.corpus.prepare.publish import published
from nemo_llm.errors import InputError, NemoLlmError
from nemo_llm.processes import end_with
from nemo_llm.storage.build_cache import write_json_atomically
from nemo_llm.storage.build_lock import build_lock

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
    try:
        plan.output.parent.mkdir(parents=True, exist_ok=True)
        with build_lock(Path(f"{plan.output}.lock")):
            report = published(plan)
            if report is None:
                _open_work(plan, how)
                if how.slurm is not None:
                    _submit(plan, how.slurm)
                    return None
                _run_here(plan, how.workers, on_progress)
                report = published(plan)
                assert report is not None
            if plan.work.exists():
                shutil.rmtree(plan.work)
            return report
    except OSError as error:
        raise InputError(_disk_message(plan, error)) from error
    except BrokenProcessPool as error:
        raise NemoLlmError(
            "a worker was killed, most likely for want of memory; what is done is kept: run the same command again, "
            f"with fewer workers than {how.workers} if it was memory"
        ) from error


def _open_work(plan: PreparePlan, how: HowToRun) -> None:
    """Make the folder of a new run, or make sure that an interrupted one was the same."""
    empty = plan.output.is_dir() and not any(plan.output.iterdir())
    if plan.output.exists() and not empty and not how.overwrite:
        raise InputError(
            f"output = {plan.output}: exists already, made from other inputs or settings; pass overwrite=true to "
            "replace it, or choose another folder"
        )
    if how.restart and plan.work.exists():
        shutil.rmtree(plan.work)
    path = plan.work / "plan.json"
    identity = json.loads(json.dumps(plan.identity()))
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != identity:
            raise InputError(
                f"{plan.work} holds an interrupted run with other inputs or settings; rerun with those, or pass "
                "restart=true to throw it away"
            )
        return
    plan.work.mkdir(exist_ok=True)
    write_json_atomically(path, identity)


def _run_here(plan: PreparePlan, workers: int, on_progress: OnProgress) -> None:
    with (plan.work / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for workers of a killed run to be gone
        fcntl.flock(lock, fcntl.LOCK_UN)
    with contextlib.ExitStack() as stack:
        pool = None
        if workers:
            context = get_context(
                "spawn"
            )  # a forked process would inherit the libraries' threads as locks nobody opens
            arguments = (plan, os.getpid())
            workers = min(workers, max(stage.tasks for stage in plan.stages()))
            pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
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


def _executor(plan: PreparePlan, stage: Stage) -> LocalPipelineExecutor:
    steps = build_steps(plan, stage.name)
    return LocalPipelineExecutor(steps, tasks=stage.tasks, workers=1, logging_dir=str(plan.logs(stage.name)))


def _run_task(plan: PreparePlan, stage: Stage, rank: int) -> None:
    # The private _run_for_rank is what every executor of datatrove 0.10.1 calls for a task. Its own run() hands tasks
    # to a multiprocessing pool, which waits for ever when a worker is killed. A local rank other than 0 keeps the log
    # out of the terminal; its errors, which go there all the same, come to us as exceptions.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        _executor(plan, stage)._run_for_rank(rank, local_rank=1)


def _start_worker(plan: PreparePlan, parent: int) -> None:
    """Prepare a worker process; it ends when its parent does, and holds a lock that a rerun waits for."""
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    lock = os.open(plan.work / _LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)  # never closed: it goes with the process


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


def _disk_message(plan: PreparePlan, error: OSError) -> str:
    where = error.filename or plan.output.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}: no space left ({error.strerror}). What is done is kept: free some and run the same command"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{where}: cannot be written ({error.strerror}); choose an output folder that you may write to"
    return f"{where}: {error.strerror or error}"
