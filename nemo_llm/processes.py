"""Worker processes that must not outlive the process that started them."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def worker_pool(workers: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Processes that call ``prepare(*arguments)`` and then take work; they start with the first task."""
    context = get_context("spawn")  # a forked process would inherit the libraries' threads as locks nobody opens
    given = (os.getpid(), prepare, arguments)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=given)


def _start(parent: int, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    prepare(*arguments)


def _end_with(parent: int) -> None:
    """End this process soon after its parent has ended, however that ended; runs in a thread."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
