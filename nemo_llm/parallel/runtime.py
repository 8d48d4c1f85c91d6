"""Start and stop the distributed side of a process: device, process groups, Megatron's global state.

This is the one module that touches Megatron's ``parallel_state``. Everything else receives a `ParallelRuntime`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from nemo_llm.config import ParallelismConfig
from nemo_llm.config.sections.model_setting import RuntimeSetting
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.launcher import ProcessPlace, find_process_place
from nemo_llm.megatron import cuda_on_cpu


def _set_slurm_rendezvous() -> None:
    """Derive MASTER_ADDR and MASTER_PORT from Slurm's node list; the same on every task of a job step."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ["SLURM_STEP_NODELIST"]
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    if "MASTER_PORT" not in os.environ:
        job, restart = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        os.environ["MASTER_PORT"] = str(20000 + (job * 7 + restart) % 20000)


@dataclass(frozen=True)
class ParallelRuntime:
    """This process' device, place and process groups. ``groups`` is Megatron's ProcessGroupCollection."""

    place: ProcessPlace
    device: torch.device
    parallelism: ParallelismConfig
    groups: Any

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def is_first_rank(self) -> bool:
        return self.place.rank == 0

    @cached_property
    def tp_rank(self) -> int:
        return dist.get_rank(self.groups.tp)

    @cached_property
    def pp_rank(self) -> int:
        return dist.get_rank(self.groups.pp)

    @cached_property
    def cp_rank(self) -> int:
        return dist.get_rank(self.groups.cp)

    @cached_property
    def dp_rank(self) -> int:
        return dist.get_rank(self.groups.dp)

    @cached_property
    def dp_size(self) -> int:
        return dist.get_world_size(self.groups.dp)

    @cached_property
    def experts_have_own_groups(self) -> bool:
        """Whether experts are split, or copied, over other ranks than dense weights are."""
        pairs = ((self.groups.expt_tp, self.groups.tp), (self.groups.expt_dp, self.groups.dp_cp))
        return any(dist.get_process_group_ranks(a) != dist.get_process_group_ranks(b) for a, b in pairs)

    @cached_property
    def is_last_pipeline_stage(self) -> bool:
        return self.pp_rank == dist.get_world_size(self.groups.pp) - 1

    @cached_property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage in this process' pipeline."""
        return dist.get_process_group_ranks(self.groups.pp)[-1]

    def shorten_timeouts(self, minutes: float) -> None:
        """Set the timeout of every process group; called once the slow first step is over."""
        for group in [None, *list(dist.distributed_c10d._world.pg_map)]:
            # torch has no public call that changes the timeout of a living group (looked for in torch 2.13);
            # tests/megatron/test_contract.py fails when this private one is gone.
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def select_device(setting: RuntimeSetting, place: ProcessPlace) -> torch.device:
    """Take the GPU of this local rank, or the CPU under Megatron's device mapping.

    Raises:
        ConfigError: ``trainer.accelerator=cuda`` without a usable GPU for this local rank.
    """
    wanted = setting.accelerator
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        cuda_on_cpu.install()
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found <= place.local_rank:
        raise ConfigError(
            [
                Problem(
                    key="trainer.accelerator",
                    value=wanted,
                    rule=f"local rank {place.local_rank} needs a GPU of its own and this node shows {found}",
                    fix="start one process a GPU, or run on CPU with trainer.accelerator=cpu",
                )
            ]
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def start_runtime(setting: RuntimeSetting, place: ProcessPlace | None = None) -> ParallelRuntime:
    """Initialise torch.distributed and Megatron's groups for the layout that the setting asks for.

    The timeout is the long one of the first step (compilation, lazy communicator set-up); the loop shortens it.

    Raises:
        ConfigError: no GPU where one was asked for.
    """
    place = place or find_process_place()
    if setting.deterministic:
        _make_deterministic()
    # Before anything of CUDA or NCCL starts; what stands in the environment is the user's and wins.
    for name, value in setting.environment.items():
        os.environ.setdefault(name, value)
    device = select_device(setting, place)
    # Grown segments instead of many of fixed sizes: less memory lost to fragments when activations change size.
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name, which the older would beat
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if setting.parallelism.tensor_model_parallel_size * setting.parallelism.context_parallel_size > 1:
        # Kernels then start in the order they were launched, which Megatron's overlap of TP and CP relies on.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # NCCL's flight recorder keeps the last collectives, which the watchdog writes out when the run hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if place.launcher == "slurm":
        _set_slurm_rendezvous()
    timeout = timedelta(minutes=setting.timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():  # the caller's world, as in tests that keep their ranks warm
        return set_layout(setting, place, device)
    if place.launcher == "single":
        store = dist.FileStore(tempfile.mktemp(prefix="nemo_llm_store_"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif "TORCHELASTIC_RESTART_COUNT" in os.environ and place.num_nodes == 1:
        # torchrun's default rendezvous keeps its store from attempt to attempt, and gloo then finds the addresses of
        # ranks that are gone. (Over several nodes its c10d rendezvous makes a new store each time.)
        store, rank, size = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, timeout=timeout)
    return set_layout(setting, place, device)


def _make_deterministic() -> None:
    """Only operations that repeat bit by bit; those that cannot raise. Before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)


def set_layout(setting: RuntimeSetting, place: ProcessPlace, device: torch.device) -> ParallelRuntime:
    """Build Megatron's process groups for ``setting.parallelism`` over the world that is already up."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    layout = setting.parallelism
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=setting.timeout_minutes,
        create_gloo_process_groups=device.type == "cuda",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(setting.seed)
    return ParallelRuntime(place, device, layout, ProcessGroupCollection.use_mpu_process_groups())


def clear_layout() -> None:
    """Forget Megatron's process groups, so that another layout can be set in the same process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


@contextmanager
def own_runtime(setting: RuntimeSetting, place: ProcessPlace | None = None) -> Iterator[ParallelRuntime]:
    """A runtime for one piece of work; in a world that is up already the layout alone comes and goes."""
    own_world = not dist.is_initialized()
    runtime = start_runtime(setting, place)
    try:
        yield runtime
    finally:
        if own_world:
            stop_runtime()
        else:
            clear_layout()


def stop_runtime() -> None:
    """Leave the process groups. Safe to call when they were never started."""
    if dist.is_initialized():
        if "megatron.core.parallel_state" in sys.modules:
            clear_layout()
        dist.destroy_process_group()
