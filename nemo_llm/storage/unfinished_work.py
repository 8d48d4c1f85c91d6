"""Long work that goes on where an earlier process was interrupted: one process at it, in a folder that says what it is.

Work stands in ``OUTPUT.partial`` with a ``plan.json`` of all that the result depends on.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from nemo_llm.errors import InputError, NemoLlmError
from nemo_llm.storage.atomic_files import write_json
from nemo_llm.storage.locks import build_lock


@contextmanager
def one_at_a_time(key: str, output: Path, workers: int) -> Iterator[None]:
    """Hold the lock of `output` while the block works on it.

    Args:
        key: that the user named `output` with, for messages.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
        NemoLlmError: a worker process was killed. In both cases what was done stays.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with build_lock(Path(f"{output}.lock")):
            yield
    except OSError as error:
        where, why = error.filename or output.parent, error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = f"no space left ({why}). What is done is kept: free some space and run the same command"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            why = f"cannot be written ({why}); choose an {key} in a folder that you may write to"
        raise InputError(f"{where}: {why}") from error
    except BrokenProcessPool as error:
        raise NemoLlmError(
            "a worker was killed, most likely for want of memory; what is done is kept: run the same command again, "
            f"with fewer workers than {workers} if it was memory"
        ) from error


def open_work(folder: Path, identity: object, restart: bool) -> None:
    """Make the folder of new work, or make sure that what was interrupted there was the same.

    Args:
        identity: all that the result depends on, as JSON has it.
        restart: throw away what is there.

    Raises:
        InputError: work with another identity is there.
    """
    plan = folder / "plan.json"
    if restart and folder.exists():
        shutil.rmtree(folder)
    if not plan.exists():
        folder.mkdir(exist_ok=True)
        write_json(plan, identity)
    elif json.loads(plan.read_text(encoding="utf-8")) != json.loads(json.dumps(identity)):
        raise InputError(
            f"{folder} holds an interrupted run with other inputs or settings; rerun with those, or pass restart=true "
            "to throw it away"
        )
