"""Whether a batch-size ramp fits the layout; its arithmetic stands in `nemo_llm.config.batch_ramp`."""

from collections.abc import Iterator

from nemo_llm.config.batch_ramp import BatchRamp, build_batch_ramp
from nemo_llm.config.trainer import TrainerConfig
from nemo_llm.errors import Problem

__all__ = ["BatchRamp", "build_batch_ramp", "check_batch_ramp"]


def check_batch_ramp(trainer: TrainerConfig, data_parallel_size: int) -> Iterator[Problem]:
    """Problems of ``trainer.rampup_batch_size``: a ramp that misses its end, or sizes that do not divide evenly.

    Every size on the way must be a multiple of micro-batch size x `data_parallel_size`; that of
    ``trainer.global_batch_size`` itself is checked with the layout.
    """
    ramp = trainer.rampup_batch_size
    if ramp is None:
        return
    key = "trainer.rampup_batch_size"
    rise = trainer.global_batch_size - ramp.start_global_batch_size
    if rise < 0:
        yield Problem(
            f"{key}.start_global_batch_size",
            ramp.start_global_batch_size,
            f"must not exceed trainer.global_batch_size = {trainer.global_batch_size}",
            f"start at {trainer.global_batch_size} or below, or set rampup_batch_size: null",
        )
        return
    if rise % ramp.increment:
        yield Problem(
            f"{key}.increment",
            ramp.increment,
            f"must divide the rise of {rise} from start_global_batch_size = {ramp.start_global_batch_size} "
            f"to trainer.global_batch_size = {trainer.global_batch_size}",
            f"use a divisor of {rise}",
        )
    unit = trainer.micro_batch_size * data_parallel_size
    for name, value in (("start_global_batch_size", ramp.start_global_batch_size), ("increment", ramp.increment)):
        if value % unit and rise:
            yield Problem(
                f"{key}.{name}",
                value,
                f"must be a multiple of micro-batch size x data-parallel size = "
                f"{trainer.micro_batch_size} x {data_parallel_size} = {unit}",
                f"use {max(unit, value // unit * unit)}, or a smaller micro-batch or data-parallel size",
            )
