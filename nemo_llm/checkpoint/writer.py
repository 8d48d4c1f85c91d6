"""Write Megatron's ``torch_dist`` format from threads of this process, hashed on the way.

Megatron-Core's own writer starts helper processes, which outlive a killed rank and keep its pipes open. Here the plan
is Megatron's (which rank writes which part of which tensor), and the writing is a few threads: PyTorch and xxhash
release Python's global lock for everything large. Ranks report through the key-value store that they met at, so that no
collective runs beside those of training.

What is used of Megatron's plan without being public stands in megatron/patches.toml (`checkpoint_plan`); of PyTorch
`_StoragePrefix` and `_get_default_store`, whose names tests/megatron/test_contract.py holds.
"""

import dataclasses
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from nemo_llm.checkpoint.state_files import StateFile, write_metadata
from nemo_llm.errors import CheckpointError
from nemo_llm.megatron.checkpoint import by_stored_names
from nemo_llm.storage.host_buffers import HostBuffer, Snapshot

_POLL_SECONDS = 0.02


class _PlanOnlyWriter(FileSystemWriter):
    """Takes Megatron's plan and keeps what this rank has to write."""

    can_run_decentralized_global_plan = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.items: list[tuple[Any, Any]] = []
        self.prefix = ""

    def prepare_decentralized_global_plan(self, plan: Any) -> Any:
        """Name this rank's files after the rank."""
        return dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Keep (item, tensor or bytes) of everything that this rank writes."""
        self.prefix = plan.storage_data.prefix
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where its own writer would begin."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.writer: _PlanOnlyWriter | None = None
        self.metadata: Any = None

    def async_save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> AsyncRequest:
        """Plan; nothing is written."""
        renamed, _, _ = by_stored_names(sharded_state_dict, self.keep_only_main_replica)
        self.writer = _PlanOnlyWriter(checkpoint_dir)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(renamed, False), self.writer, None, 0, planner=planner
        )
        self.metadata = planned[0][1]
        return AsyncRequest(None, (), [])


class StateWriter:
    """Writes sharded state dicts; one for the life of a run, since it keeps the host memory of its copies.

    Args:
        group: ranks that hold the same replicas (data and context parallel); they share the writing. None: the world.
        threads: files, and threads that write them, of each rank.
    """

    def __init__(self, group: Any, threads: int) -> None:
        self.buffer = HostBuffer()
        self._group, self._threads = group, threads
        self._count = 0

    def begin(self, state: dict, folder: Path, copy: bool) -> "WritePlan":
        """Plan the writing of ``state`` into ``folder``; a collective of all ranks, on their main threads.

        Args:
            copy: copy the tensors to host memory, so that they may change from `WritePlan.copied` on. Without it they
                must stay as they are until `WritePlan.write` is done.
        """
        self._count += 1
        strategy = _PlanningStrategy()
        dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=FullyParallelSaveStrategyWrapper(strategy, self._group),
            validate_access_integrity=self._count == 1,  # the structure is the same at each later save
            async_sharded_save=True,
        )
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        writer = strategy.writer
        assert writer is not None
        tensors = [data for item, data in writer.items if item.type is not WriteItemType.BYTE_IO]
        snapshot = Snapshot(self.buffer, [tensor.detach() for tensor in tensors]) if copy else None
        return WritePlan(writer, strategy.metadata, snapshot, self._threads, f"nemo_llm/save/{folder}")


class WritePlan:
    """What one rank writes of one checkpoint. `write` runs in a thread; `collect` on the first rank, after it."""

    def __init__(self, writer: _PlanOnlyWriter, metadata: Any, snapshot: Snapshot | None, threads: int, name: str):
        self._writer, self._metadata, self.snapshot = writer, metadata, snapshot
        self._threads, self._name = threads, name
        self._store = dist.distributed_c10d._get_default_store()

    def write(self) -> None:
        """Write this rank's files and tell the first rank, errors too."""
        try:
            report: tuple[str, Any] = ("done", self._write_files())
        except Exception as error:
            report = ("failed", f"{type(error).__name__}: {error}")
        self._store.set(f"{self._name}/{dist.get_rank()}", pickle.dumps(report))

    def collect(self) -> dict[str, dict[str, Any]]:
        """Wait for all ranks, write ``.metadata``; returns the manifest entries of their files. First rank only.

        Raises:
            CheckpointError: a rank could not write; says which and why.
        """
        places: dict[MetadataIndex, _StorageInfo] = {}
        entries: dict[str, dict[str, Any]] = {}
        for rank in range(dist.get_world_size()):
            key = f"{self._name}/{rank}"
            while not self._store.check([key]):
                time.sleep(_POLL_SECONDS)
            kind, content = pickle.loads(self._store.get(key))  # from our own ranks, through the job's own store
            self._store.delete_key(key)  # or a later save into the same folder would read it
            if kind == "failed":
                raise CheckpointError(f"rank {rank} could not write its part of {self._writer.path}: {content}")
            places |= content[0]
            entries |= content[1]
        write_metadata(Path(self._writer.path), self._metadata, places)
        return entries

    def _write_files(self) -> tuple[dict[MetadataIndex, _StorageInfo], dict[str, dict[str, Any]]]:
        if self.snapshot is not None:
            self.snapshot.wait_on_host()
            copies = iter(self.snapshot.tensors)
            items = [(i, data if i.type is WriteItemType.BYTE_IO else next(copies)) for i, data in self._writer.items]
        else:
            items = self._writer.items
        files = _share_out(items, self._threads)
        names = [f"{self._writer.prefix}{number}.distcp" for number in range(len(files))]
        with ThreadPoolExecutor(max(1, len(files)), "checkpoint-file") as pool:
            done = list(pool.map(self._write_file, names, files))
        self._writer.items = []
        places = {index: place for found, _ in done for index, place in found.items()}
        return places, {f"state/{name}": entry for name, (_, entry) in zip(names, done, strict=True)}

    def _write_file(
        self, name: str, items: list[tuple[Any, Any]]
    ) -> tuple[dict[MetadataIndex, _StorageInfo], dict[str, Any]]:
        with StateFile(Path(self._writer.path) / name) as file:
            places = {item.index: file.append(data) for item, data in items}
        return places, file.entry()


def _share_out(items: list[tuple[Any, Any]], count: int) -> list[list[tuple[Any, Any]]]:
    """Items in at most ``count`` files of about equal size, large ones first."""
    sizes = [len(data.getbuffer()) if hasattr(data, "getbuffer") else data.nbytes for _, data in items]
    files: list[list[tuple[Any, Any]]] = [[] for _ in range(min(count, len(items)))]
    filled = [0] * len(files)
    for number in sorted(range(len(items)), key=lambda index: -sizes[index]):
        smallest = filled.index(min(filled))
        files[smallest].append(items[number])
        filled[smallest] += sizes[number]
    return files
