"""What every command does around its own work: arguments, help, one message for an error, exit code.

`run_entry_point` is for training, `run_tool` for commands that are composed from a file of their own
(``conf/NAME.yaml``), `run_options` for those with options and sub-commands.

Imports neither torch nor Hydra at module level, so that ``--help`` answers at once.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nemo_llm.config.compose.catalog import conf_dir, group_choices, known_keys
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import NO_VALUE, ConfigError, ExitCode, InputError, NemoLlmError, Problem
from nemo_llm.log import configure_logging, is_first_rank, launched_world_size, say

_FIRST_RANK_GRACE_SECONDS = 10.0
_INTERRUPTED = 130
_HELP_FLAGS = ("-h", "--help")
_PRINT_FLAG = "--print-config"
_FOLDER_FLAG = "--config-dir"

T = TypeVar("T")


def run_command(work: Callable[[], int | None]) -> int:
    """Do the work of a command and return its exit code; None means done.

    Errors that a user can put right end in one message on the first rank and no traceback; any other exception is
    left to Python.
    """
    try:
        code = work()
    except NemoLlmError as error:
        say(f"error: {error}", sys.stderr)
        if not is_first_rank():
            # A launcher ends all processes as soon as one has failed: the first rank must get to print before that.
            time.sleep(_FIRST_RANK_GRACE_SECONDS)
        code = error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    return ExitCode(code or ExitCode.DONE).of_process()


def run_entry_point(main: Callable[[RunConfig], int | None], argv: Sequence[str] | None = None) -> int:
    """Compose and check the configuration of a run that `argv` asks for, and call `main` with it, see `run_command`.

    Args:
        main: does the work; an exit code that it returns is passed on.
        argv: arguments, without the program's name; None takes the process' own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> int | None:
        if any(flag in arguments for flag in _HELP_FLAGS):
            say(help_text("python -m nemo_llm.train", "Train a language model."))
            return None
        overrides, folder, only_print = _read_flags(arguments)
        cfg = load(overrides, folder)
        if only_print:
            say(_as_yaml(cfg))
        return None if only_print else main(cfg)

    return run_command(work)


def run_tool(name: str, schema: type[T], main: Callable[[T], int | None], argv: Sequence[str] | None = None) -> int:
    """Compose ``conf/NAME.yaml`` with the arguments and call `main` with it, see `run_command`."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> int | None:
        if any(flag in arguments for flag in _HELP_FLAGS):
            say(f"{sys.modules[main.__module__].__doc__}\n{(conf_dir() / f'{name}.yaml').read_text(encoding='utf-8')}")
            return None
        configure_logging()
        # Hydra and pydantic take half a second to import, which --help need not pay.
        from nemo_llm.config.commands.data import compose_tool

        return main(compose_tool(name, schema, arguments))

    return run_command(work)


def run_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Call what the options say (``run_command``, see `add_command`) with them, see `run_command`."""
    options = parser.parse_args(argv)
    configure_logging()
    return run_command(lambda: options.run_command(options))


def options_of(description: str | None) -> argparse.ArgumentParser:
    """A parser of options that shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
) -> argparse.ArgumentParser:
    """A sub-command that calls `run` with its options; `text` is its line of help."""
    command = commands.add_parser(name, help=text)
    command.set_defaults(run_command=run)
    return command


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
