"""Logging: one format, one switch, and the question which process of a run may speak."""

import logging
import os
import sys
from collections.abc import Mapping

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def launched_rank(environ: Mapping[str, str] | None = None) -> int:
    """Global rank given by the launcher (torchrun's ``RANK``, else Slurm's ``SLURM_PROCID``), 0 without one.

    Known before any process group exists, so that configuration errors can be printed once.
    """
    environ = os.environ if environ is None else environ
    for name in ("RANK", "SLURM_PROCID"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 0


def launched_world_size(environ: Mapping[str, str] | None = None) -> int:
    """Number of processes given by the launcher (``WORLD_SIZE``, else a Slurm step's tasks), 1 without one."""
    environ = os.environ if environ is None else environ
    # SLURM_NTASKS alone is also set in a batch script that has started no step; SLURM_STEP_NUM_TASKS is srun's own.
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 1


def is_first_rank(environ: Mapping[str, str] | None = None) -> bool:
    """True on the one process of a run that prints."""
    return launched_rank(environ) == 0


def get_logger(name: str) -> logging.Logger:
    """Logger below ``nemo_llm``, which `configure_logging` sets up."""
    return logging.getLogger(name if name.startswith("nemo_llm") else f"nemo_llm.{name}")


def configure_logging(level: int = logging.INFO) -> None:
    """Send the project's log to stderr: everything on the first rank, warnings and worse on the others."""
    logger = logging.getLogger("nemo_llm")
    logger.setLevel(level if is_first_rank() else max(level, logging.WARNING))
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if launched_world_size() == 1 else f"[rank {launched_rank()}] "
        handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
