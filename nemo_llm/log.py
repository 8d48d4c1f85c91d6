"""Logging: one format, one switch, and the question which process of a run may speak."""

import logging
import sys
from collections.abc import Mapping

from nemo_llm.processes import find_process_place

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def is_first_rank(environ: Mapping[str, str] | None = None) -> bool:
    """True on the one process of a run that prints."""
    return find_process_place(environ).rank == 0


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
        place = find_process_place()
        prefix = "" if place.world_size == 1 else f"[rank {place.rank}] "
        handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
