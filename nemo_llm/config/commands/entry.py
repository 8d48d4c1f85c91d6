"""What the commands that are composed from a file of their own (``conf/NAME.yaml``) do around their work.

Imports neither torch nor Hydra at module level, so that ``--help`` answers at once.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from nemo_llm.config.compose.catalog import conf_dir
from nemo_llm.errors import ExitCode, NemoLlmError
from nemo_llm.log import is_first_rank

_FIRST_RANK_GRACE_SECONDS = 10.0

T = TypeVar("T")


def run_tool(name: str, schema: type[T], main: Callable[[T], int | None], argv: Sequence[str] | None = None) -> int:
    """Compose ``conf/NAME.yaml`` with the arguments, call `main` with it, and return the exit code.

    Errors that a user can put right end in one message on the first rank and no traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        _say((conf_dir() / f"{name}.yaml").read_text(encoding="utf-8"), sys.stdout)
        return ExitCode.DONE
    try:
        # Hydra and pydantic take half a second to import, which --help need not pay.
        from nemo_llm.config.commands.data import compose_tool

        code = main(compose_tool(name, schema, arguments))
    except NemoLlmError as error:
        _say(f"error: {error}", sys.stderr)
        if not is_first_rank():
            # A launcher ends all processes as soon as one has failed: the first rank must get to print before that.
            time.sleep(_FIRST_RANK_GRACE_SECONDS)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return ExitCode.DONE if code is None else code


def _say(text: str, stream: object) -> None:
    if is_first_rank():
        print(text, file=stream, flush=True)  # type: ignore[call-overload]
