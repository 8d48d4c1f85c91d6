"""Warm ranks: processes that have imported Megatron once and then change layout in place, test after test.

A fork server imports the training code a single time; each rank is forked from it, so four ranks cost one import.
"""

import gc
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 300


class RankPool:
    """Up to ``size`` processes; `run` calls one function on the first few of them as one torch.distributed world."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks_preload"])
        self._links: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))  # no daemon: a checkpoint starts a helper
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """Call ``function(*arguments)`` on ranks 0 to ``world_size - 1``; returns each rank's result.

        Raises:
            AssertionError: a rank raised (its traceback is the message), died or did not answer in time.
        """
        store = tempfile.mktemp(prefix="ranks_")
        for rank in range(world_size):
            name = (function.__module__, function.__qualname__)
            self._links[rank].send((name, arguments, rank, world_size, store))
        answers = [self._answer(rank) for rank in range(world_size)]
        Path(store).unlink(missing_ok=True)
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self._links[rank].poll(_TIMEOUT_SECONDS):
            return False, f"no answer within {_TIMEOUT_SECONDS} s"
        try:
            return self._links[rank].recv()
        except EOFError:
            return False, f"the process died with exit code {self._processes[rank].exitcode}"

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()


def _serve(link: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: collecting after each call then takes milliseconds
    while True:
        try:
            (module, name), arguments, rank, world_size, store = link.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
        )
        try:
            link.send((True, _call_in_world(module, name, arguments, store)))
        except Exception:
            link.send((False, traceback.format_exc()))


def _call_in_world(module: str, name: str, arguments: tuple, store: str) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    from nemo_llm.megatron import cuda_on_cpu
    from nemo_llm.parallel.runtime import stop_runtime

    cuda_on_cpu.install()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_SECONDS),
    )
    try:
        return getattr(importlib.import_module(module), name)(*arguments)
    finally:
        stop_runtime()
        _give_back()


def _give_back() -> None:
    """Let go of the models of a call: they hold its process groups, three threads each that wake up all the time."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    RotaryEmbedding.forward.cache_clear()
    for left in gc.get_objects():
        if issubclass(type(left), MoETokenDispatcher):  # isinstance would ask weak proxies, of which some are dead
            vars(left).clear()  # it keeps the last step's graph, which holds the hooks of Megatron's DDP unseen by gc
    gc.collect()
