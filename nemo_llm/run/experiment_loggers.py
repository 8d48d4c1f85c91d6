"""Experiment tracking: NeMo's `exp_manager` for its logs and loggers, in a folder of the run and nowhere else.

NeMo 3.0 writes what was started (command line, commit, uncommitted changes), collects warnings and errors in one file,
and makes the TensorBoard and Weights & Biases loggers. It wants a Lightning trainer; there is none here, so it is given
the few attributes that it reads. Everything that leans on NeMo's insides stands in this file, each with its reason, and
`tests/training/test_experiment.py` fails when NeMo changes one of them.

Only the first rank imports NeMo: on the others `exp_manager` would only sleep and make loggers that write nothing.
"""

import logging
import logging.handlers
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemo_llm.config.checks.recipe import logger_problems
from nemo_llm.config.sections.run_services import ExpManagerConfig
from nemo_llm.errors import NO_VALUE, ConfigError, Problem
from nemo_llm.log import get_logger

_log = get_logger(__name__)

LOG_FOLDER = "logs"
"""Folder inside the run folder that NeMo may use. It must not be the run folder itself: `check_resume` of NeMo 3.0.0
moves every file that it finds in its folder into `run_0/`, `run_1/` and so on at each start, `resume_if_exists` or not.
In here that is welcome, since each start of a run keeps its own command and error log."""

_FAILURES_BEFORE_DROP = 5


class MetricsBackend(Protocol):
    """One place that metrics go to. Lightning's loggers have this form already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_hyperparams(self, params: dict[str, Any]) -> None: ...

    def finalize(self, status: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ExperimentRun:
    """What an experiment needs to know of the run that it belongs to.

    Attributes:
        run_dir: the run folder; only its `logs/` is touched.
        name: `run.name`, shown by Weights & Biases and MLflow.
        rank: global rank of this process; only rank 0 writes.
        max_steps: `trainer.max_steps`.
        resume_step: last step of the checkpoint that the run goes on from, 0 for a new run.
    """

    run_dir: Path
    name: str
    rank: int
    max_steps: int
    resume_step: int


class ExperimentLogger:
    """Sends metrics to every backend. One that fails warns, and never ends a run: `metrics.jsonl` is the record."""

    def __init__(self, backends: Sequence[MetricsBackend], error_handlers: Sequence[logging.Handler] = ()):
        self._failures = dict.fromkeys(backends, 0)  # of each backend in use, how often it failed running
        self._error_handlers = tuple(error_handlers)
        for handler in self._error_handlers:
            logging.getLogger("nemo_llm").addHandler(handler)

    @property
    def backends(self) -> tuple[MetricsBackend, ...]:
        """Backends still in use."""
        return tuple(self._failures)

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log `metrics` (None values are left out) at optimizer step `step`."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        self._each("log_metrics", known, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the resolved configuration, once, as the run's hyperparameters."""
        self._each("log_hyperparams", dict(config))

    def close(self, succeeded: bool) -> None:
        """Flush and close every backend; `succeeded` is the state that trackers show. Closing twice does nothing."""
        self._each("finalize", "success" if succeeded else "failed")
        self._failures = {}
        for handler in self._error_handlers:
            logging.getLogger("nemo_llm").removeHandler(handler)
            handler.close()
        self._error_handlers = ()

    def _each(self, method: str, *arguments: object) -> None:
        for backend in list(self._failures):
            name = type(backend).__name__
            try:
                getattr(backend, method)(*arguments)
            except Exception as error:  # a tracking server that is away must not end a run of weeks
                self._failures[backend] += 1
                _log.warning("%s.%s failed: %s: %s", name, method, type(error).__name__, error)
                if self._failures[backend] >= _FAILURES_BEFORE_DROP:
                    del self._failures[backend]
                    _log.error("%s failed %d times running and is left out", name, _FAILURES_BEFORE_DROP)
            else:
                self._failures[backend] = 0


def start_experiment(settings: ExpManagerConfig, run: ExperimentRun) -> ExperimentLogger:
    """Start the experiment's logs and loggers; on ranks other than 0 the logger that comes back writes nothing.

    Args:
        settings: the `exp_manager` section. With `enabled` false NeMo is not imported, and TensorBoard's own writer
            serves if `create_tensorboard_logger` is true.
        run: the run it belongs to.

    Raises:
        ConfigError: a logger is asked for that this configuration or this installation cannot have, or, in a new run,
            one that cannot be reached.
    """
    problems = list(logger_problems(settings))
    if problems:
        raise ConfigError(problems)
    if run.rank != 0:
        return ExperimentLogger(())
    log_dir = run.run_dir / LOG_FOLDER
    log_dir.mkdir(parents=True, exist_ok=True)
    if not settings.enabled:
        return ExperimentLogger([_TensorBoardWriter(log_dir, run)] if settings.create_tensorboard_logger else [])
    trainer, error_handler = _run_exp_manager(settings, run, log_dir)
    loggers = list(trainer.loggers)
    if settings.create_mlflow_logger:
        loggers.append(_mlflow_logger(settings, run, log_dir))
    return ExperimentLogger(_connected(loggers, run), [error_handler])


# --- NeMo -----------------------------------------------------------------------------------------------------------


@dataclass
class _SoloTrainer:
    """The part of Lightning's `Trainer` that `exp_manager` of NeMo 3.0.0 reads, for one process on its own.

    One node with one device, whatever the size of the job: `exp_manager` works out its rank as
    `node_rank * num_devices + LOCAL_RANK`, and with more than one device it reports the lack of Lightning's DDP and of
    Lightning's Slurm plug-in as errors, though nothing is wrong.
    """

    max_steps: int
    node_rank: int = 0
    num_nodes: int = 1
    num_devices: int = 1
    fast_dev_run: bool = False
    logger: object = None
    strategy: object = None
    ckpt_path: str | None = None
    max_epochs: int | None = None
    check_val_every_n_epoch: int | None = None
    callbacks: list[object] = field(default_factory=list)
    loggers: list[Any] = field(default_factory=list)
    _default_root_dir: Path | None = None

    @property
    def _logger_connector(self) -> "_SoloTrainer":
        # NeMo hands its loggers over with `trainer._logger_connector.configure_logger(...)`, a private name of
        # Lightning 2.4.0. Lightning's own connector asks for a whole trainer.
        return self

    def configure_logger(self, loggers: list[Any]) -> None:
        """Take the loggers that NeMo made."""
        self.loggers = list(loggers)


def _run_exp_manager(
    settings: ExpManagerConfig, run: ExperimentRun, log_dir: Path
) -> tuple[_SoloTrainer, logging.Handler]:
    """Call NeMo's `exp_manager` in `log_dir`; give back the loggers it made, and the handler of its error file."""
    exp_manager, nemo_logging = _import_nemo()
    trainer = _SoloTrainer(max_steps=run.max_steps)
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(log_dir),
            "resume_if_exists": False,
            "create_tensorboard_logger": settings.create_tensorboard_logger,
            # Rows of steps that a crashed run wrote beyond its last checkpoint are hidden, not drawn twice.
            "summary_writer_kwargs": {"default_hp_metric": False, "purge_step": _purge_step(run)},
            "create_wandb_logger": settings.create_wandb_logger,
            "wandb_logger_kwargs": {"name": run.name, **settings.wandb_logger_kwargs}
            if settings.create_wandb_logger
            else None,
            # exp_manager of 3.0.0 cannot make an MLflow logger: it passes `run_name` twice. See `_mlflow_logger`.
            "create_mlflow_logger": False,
            # What follows works on Lightning's loop and checkpoints, which take no part in this project.
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            "log_step_timing": False,
            "log_tflops_per_sec_per_gpu": False,
            "disable_validation_on_resume": False,
            "seconds_to_sleep": 0,
        },
    )
    _tame_loggers()
    # `_handlers` is private (NeMo 3.0.0). Handing this one on brings the project's own warnings into the same file.
    return trainer, nemo_logging._handlers["file_err"]


def _import_nemo() -> tuple[Any, Any]:
    """NeMo's `exp_manager` and its logger, imported without a word on the terminal and without changed warnings."""
    # Its telemetry, nv_one_logger, reports at import that no exporter is set up, which is how it should be. `getLogger`
    # takes effect because that package logs below this name and sets no level of its own.
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)
    show_warning = warnings.showwarning
    from nemo.utils import logging as nemo_logging

    # Nothing of NeMo's goes to stdout or stderr, which are the progress lines': it keeps writing to its files.
    nemo_logging.remove_stream_handlers()
    from nemo.utils.exp_manager import exp_manager

    # Its logger has taken over `warnings.showwarning` for the whole process; give that back.
    nemo_logging.captureWarnings(False)
    warnings.showwarning = show_warning
    return exp_manager, nemo_logging


def _tame_loggers() -> None:
    """Undo what `exp_manager` leaves on loggers that belong to others."""
    for name in ("nemo_logger", "megatron.core", "lightning.pytorch"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            # Buffers for messages that came before the files were there. They have no target any more, or never will
            # have, and would keep every message of a run of weeks in memory.
            if isinstance(handler, logging.handlers.MemoryHandler):
                logger.removeHandler(handler)
    # Set to False by NeMo's `add_handlers_to_mcore_logger`: Megatron's messages would reach NeMo's error file alone,
    # and none of the handlers that a program has on its root logger.
    logging.getLogger("megatron.core").propagate = True


def _mlflow_logger(settings: ExpManagerConfig, run: ExperimentRun, log_dir: Path) -> Any:
    """Lightning's MLflow logger, with NeMo's argument names; without an address it writes a database in `log_dir`."""
    from lightning.pytorch.loggers import MLFlowLogger

    arguments = {"experiment_name": run.name, "run_name": run.name, **settings.mlflow_logger_kwargs}
    if "tracking_uri" not in arguments:
        # In a folder of its own, which NeMo does not move away at the next start. (MLflow 3 refuses plain folders.)
        local = log_dir / "mlflow"
        local.mkdir(exist_ok=True)
        arguments["tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{local.resolve()}/mlflow.db")
    try:
        return MLFlowLogger(**arguments)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        fix = "pip install 'nemo_llm[mlflow]'" if missing else "give arguments of Lightning's MLFlowLogger"
        value = dict(settings.mlflow_logger_kwargs)
        rule = f"MLflow's logger cannot be made: {type(error).__name__}: {error}"
        raise ConfigError([Problem("exp_manager.mlflow_logger_kwargs", value, rule, fix)]) from error


def _connected(loggers: list[Any], run: ExperimentRun) -> list[MetricsBackend]:
    """Open each of Lightning's `loggers` now: a wrong key or address shows before the first step, not hours later."""
    ready: list[MetricsBackend] = []
    for logger in loggers:
        name = type(logger).__name__
        try:
            _ = logger.experiment  # Lightning's loggers connect when this is first read
        except Exception as error:
            message = f"cannot start: {type(error).__name__}: {error}"
            if run.resume_step == 0:
                fix = "check its address and credentials, or switch it off (exp_manager.create_*_logger=false)"
                raise ConfigError([Problem(f"exp_manager ({name})", NO_VALUE, message, fix)]) from error
            # A requeued run goes on without its tracker rather than not at all.
            _log.warning("%s %s; the run goes on without it", name, message)
        else:
            ready.append(_WandbBackend(logger) if name == "WandbLogger" else logger)
    return ready


class _WandbBackend:
    """Lightning's W&B logger, which never ends its run; a failed one would then be shown as finished."""

    def __init__(self, logger: Any):
        self._logger = logger

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics(metrics, step)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self._logger.log_hyperparams(params)

    def finalize(self, status: str) -> None:
        self._logger.finalize(status)
        self._logger.experiment.finish(exit_code=0 if status == "success" else 1)


# --- without NeMo ---------------------------------------------------------------------------------------------------


def _purge_step(run: ExperimentRun) -> int | None:
    """First step whose earlier TensorBoard rows are to be hidden, None in a new run."""
    return run.resume_step + 1 if run.resume_step else None


class _TensorBoardWriter:
    """TensorBoard's own writer in the form of a `MetricsBackend`, for runs with `exp_manager.enabled=false`."""

    def __init__(self, log_dir: Path, run: ExperimentRun):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=_purge_step(run))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        # Kept as text: TensorBoard's table of hyperparameters takes a fixed set of flat values.
        lines = [f"    {key}: {value}" for key, value in params.items()]
        self._writer.add_text("config", "\n".join(lines))

    def finalize(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()
