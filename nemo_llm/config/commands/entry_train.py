"""What every composed command does around its own work: arguments, help, checks, one message per error, exit code.

Imports neither torch nor Hydra at module level, so that ``--help`` answers at once.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from nemo_llm.config.compose.catalog import conf_dir, group_choices, known_keys
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, ConfigError, ExitCode, InputError, NemoLlmError, Problem
from nemo_llm.log import is_first_rank, launched_world_size

_FIRST_RANK_GRACE_SECONDS = 10.0
_HELP_FLAGS = ("-h", "--help")
_PRINT_FLAG = "--print-config"
_FOLDER_FLAG = "--config-dir"


def run_entry_point(
    main: Callable[[RunConfig], int | None],
    argv: Sequence[str] | None = None,
    *,
    command: str = "python -m nemo_llm.train",
    summary: str = "Train a language model.",
) -> int:
    """Compose and check the configuration that `argv` asks for, call `main` with it, and return the exit code.

    Errors that a user can put right end in one message on the first rank and no traceback; any other exception is
    left to Python.

    Args:
        main: does the work; an exit code that it returns is passed on, None means done.
        argv: arguments, without the program's name; None takes the process' own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(flag in arguments for flag in _HELP_FLAGS):
            _say(help_text(command, summary), sys.stdout)
            return ExitCode.DONE
        overrides, folder, only_print = _read_flags(arguments)
        cfg = load(overrides, folder)
        if only_print:
            _say(_as_yaml(cfg), sys.stdout)
            return ExitCode.DONE
        code = main(cfg)
    except NemoLlmError as error:
        _say(str(error), sys.stderr)
        if not is_first_rank():
            # A launcher ends all processes as soon as one has failed: the first rank must get to print before that.
            time.sleep(_FIRST_RANK_GRACE_SECONDS)
        return ExitCode(error.exit_code).of_process()
    return ExitCode.DONE if code is None else ExitCode(code).of_process()


def load(overrides: Sequence[str], extra_folder: Path | None = None) -> RunConfig:
    """Compose `overrides` and check the result on the processes that there are, or that `check_only` imagines.

    Raises:
        ConfigError: with every problem found.
    """
    # Hydra and pydantic take half a second to import, which --help need not pay.
    from nemo_llm.config.checks import check
    from nemo_llm.config.compose.load import compose

    cfg = compose(overrides, extra_folder)
    check(cfg, intended_world_size(cfg))
    return cfg


def intended_world_size(cfg: RunConfig, environ: Mapping[str, str] | None = None) -> int:
    """Processes that the run has: what the launcher says; for `trainer.check_only` without one, what the config says.

    A layout of many nodes can so be checked on a laptop:
    ``trainer.check_only=true trainer.devices=8 trainer.num_nodes=16``.
    """
    launched = launched_world_size(environ)
    if cfg.trainer.check_only and launched == 1:
        return (cfg.trainer.devices or 1) * (cfg.trainer.num_nodes or 1)
    return launched


def help_text(command: str, summary: str) -> str:
    """Usage, the groups with their choices, and every key with what it takes."""
    groups = group_choices([conf_dir()])
    width = max(len(group) for group in groups)
    choices = [f"  {group:{width}}  {' | '.join(names)}" for group, names in groups.items()]
    keys = known_keys()
    sections = {name.rpartition(".")[0] for name in keys}
    leaves = [name for name in keys if name not in sections]
    lines = [
        summary,
        "",
        f"usage: {command} +model=NAME [group=NAME ...] [key=value ...] [{_FOLDER_FLAG} DIR] [{_PRINT_FLAG}]",
        "",
        "example:",
        f"  {command} +model=gpt_tiny trainer.max_steps=100 optim.lr=1e-3",
        "",
        "options:",
        f"  {_FOLDER_FLAG} DIR   search DIR for groups and files of your own as well",
        f"  {_PRINT_FLAG}     print the configuration that the arguments make, and stop",
        "",
        "groups (what they set is explained in the comments of the files in conf/):",
        *choices,
        "",
        "keys:",
        *(f"  {name}: {keys[name].description}" for name in leaves),
    ]
    return "\n".join(lines)


def _read_flags(arguments: Sequence[str]) -> tuple[list[str], Path | None, bool]:
    """Tell overrides from the few options; returns the overrides, the user's folder and whether only to print."""
    overrides: list[str] = []
    folder: Path | None = None
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name == _FOLDER_FLAG:
            folder = Path(value or next(rest, "")).expanduser()
        elif argument.startswith("-") and argument != _PRINT_FLAG:
            fix = f"write key=value; the options are {_FOLDER_FLAG}, {_PRINT_FLAG} and --help"
            raise ConfigError([Problem(argument, NO_VALUE, "no such option", fix)])
        elif argument != _PRINT_FLAG:
            overrides.append(argument)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{_FOLDER_FLAG} {folder}: there is no such folder")
    return overrides, folder, _PRINT_FLAG in arguments


def _as_yaml(cfg: RunConfig) -> str:
    import yaml

    from nemo_llm.config.compose.load import to_dict

    return yaml.safe_dump(to_dict(cfg), sort_keys=False, width=120).rstrip()


def _say(text: str, stream: TextIO) -> None:
    """Print on the first rank alone: the launcher starts this program once per process."""
    if is_first_rank():
        print(text, file=stream, flush=True)
