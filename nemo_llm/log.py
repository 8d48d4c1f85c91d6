"""Logging: one format, one switch, and the question which process of a run may speak."""

import logging
import sys
import warnings
from collections.abc import Mapping
from typing import TextIO

from nemo_llm.launcher import find_process_place

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def launched_rank(environ: Mapping[str, str] | None = None) -> int:
    """Global rank given by the launcher, 0 without one: configuration errors can so be printed once."""
    return find_process_place(environ).rank


def launched_world_size(environ: Mapping[str, str] | None = None) -> int:
    """Number of processes given by the launcher, 1 without one."""
    return find_process_place(environ).world_size


def is_first_rank(environ: Mapping[str, str] | None = None) -> bool:
    """True on the one process of a run that prints."""
    return launched_rank(environ) == 0


def say(text: str, stream: TextIO | None = None) -> None:
    """Print on the first rank alone: a launcher starts a program once per process."""
    if is_first_rank():
        print(text, file=stream, flush=True)


def get_logger(name: str) -> logging.Logger:
    """Logger below ``nemo_llm``, which `configure_logging` sets up."""
    return logging.getLogger(name if name.startswith("nemo_llm") else f"nemo_llm.{name}")


def configure_logging(level: int = logging.INFO) -> None:
    """Send the project's log to stderr: everything on the first rank, warnings and worse on the others.

    Megatron's warnings are left out: it says at every start what is not installed, and we print what was chosen.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Of torch 2.13, about a class that Megatron's checkpoints are made of; on a CPU it seems to come from us.
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    logger = logging.getLogger("nemo_llm")
    logger.setLevel(level if is_first_rank() else max(level, logging.WARNING))
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if launched_world_size() == 1 else f"[rank {launched_rank()}] "
        handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
