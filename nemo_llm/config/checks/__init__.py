"""Checks across sections, all run together before any process group exists; none of them changes a value."""

from collections.abc import Callable, Iterable

from nemo_llm.config.checks.effect import EFFECT_CHECKS
from nemo_llm.config.checks.layout import LAYOUT_CHECKS, check_devices
from nemo_llm.config.checks.model import MODEL_CHECKS
from nemo_llm.config.checks.recipe import RECIPE_CHECKS
from nemo_llm.config.checks.recompute import RECOMPUTE_CHECKS
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import ConfigError, Problem

SettingCheck = Callable[[ModelSetting, int], Iterable[Problem]]
RunCheck = Callable[[RunConfig, int], Iterable[Problem]]

SETTING_CHECKS: tuple[SettingCheck, ...] = (*LAYOUT_CHECKS, *MODEL_CHECKS, *RECOMPUTE_CHECKS, *EFFECT_CHECKS)
RUN_CHECKS: tuple[RunCheck, ...] = (check_devices, *RECIPE_CHECKS)


def setting_problems(setting: ModelSetting, world_size: int) -> list[Problem]:
    """Every problem that a model of `setting` has on `world_size` processes."""
    return [problem for check in SETTING_CHECKS for problem in check(setting, world_size)]


def find_problems(cfg: RunConfig, world_size: int) -> list[Problem]:
    """Every problem that `cfg` has on `world_size` processes."""
    problems = setting_problems(cfg.model_setting, world_size)
    return problems + [problem for check in RUN_CHECKS for problem in check(cfg, world_size)]


def check(cfg: RunConfig, world_size: int) -> None:
    """Refuse `cfg` if anything in it cannot run on `world_size` processes.

    Raises:
        ConfigError: with every problem found.
    """
    if problems := find_problems(cfg, world_size):
        raise ConfigError(problems)
