"""Checks across sections, all run together before any process group exists; none of them changes a value."""

from collections.abc import Callable, Iterable

from nemo_llm.config.checks.effect import EFFECT_CHECKS
from nemo_llm.config.checks.layout import LAYOUT_CHECKS
from nemo_llm.config.checks.model import MODEL_CHECKS
from nemo_llm.config.checks.recipe import RECIPE_CHECKS
from nemo_llm.config.checks.recompute import RECOMPUTE_CHECKS
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import ConfigError, Problem

Check = Callable[[RunConfig, int], Iterable[Problem]]

CHECKS: tuple[Check, ...] = (*LAYOUT_CHECKS, *MODEL_CHECKS, *RECIPE_CHECKS, *RECOMPUTE_CHECKS, *EFFECT_CHECKS)


def find_problems(cfg: RunConfig, world_size: int) -> list[Problem]:
    """Every problem that `cfg` has on `world_size` processes."""
    return [problem for check in CHECKS for problem in check(cfg, world_size)]


def check(cfg: RunConfig, world_size: int) -> None:
    """Refuse `cfg` if anything in it cannot run on `world_size` processes.

    Raises:
        ConfigError: with every problem found.
    """
    if problems := find_problems(cfg, world_size):
        raise ConfigError(problems)
