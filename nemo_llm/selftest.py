"""First day on a new cluster: ``sbatch slurm/selftest.sh``. How fast do the ranks reach each other, and do they agree?

Prints the bandwidth of all-reduce, and of messages from rank 0 to a rank of its node and of another node, by size. Then
all ranks train a small model for 20 steps and again from a checkpoint at half way; one process takes the same steps. It
starts the same process groups as training does, so that what is wrong with the fabric shows here first.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_llm.errors import ExitCode
from nemo_llm.log import is_first_rank, launched_world_size, say

if TYPE_CHECKING:
    from nemo_llm.config import RunConfig
    from nemo_llm.parallel.runtime import ParallelRuntime
    from nemo_llm.training.state import TrainingRun

_SIZES_MIB = {"cuda": (1, 16, 256), "cpu": (1, 16)}
_REPEATS = 5
_MIB = 1 << 20
_STEPS = 20
_SAVED_AT = 10
_TOLERANCE = {"cuda": 2e-4, "cpu": 1e-5}
"""Relative difference of losses (fp32) that another order of additions explains after 20 steps of Adam."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", help="message sizes in MiB")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on a disk that all nodes share")
    arguments = parser.parse_args(argv)

    import torch
    import torch.distributed as dist

    from nemo_llm.launcher import ProcessPlace
    from nemo_llm.parallel.runtime import own_runtime
    from nemo_llm.training.setup import build_training_run

    cfg = _configuration(launched_world_size())
    with own_runtime(cfg.runtime_setting) as runtime:
        place, device = runtime.place, runtime.device
        say(f"{place.world_size} ranks on {place.num_nodes} nodes, {dist.get_backend()}, torch {torch.__version__}")
        peers = {"within a node": 1, "across nodes": place.local_world_size}
        if place.local_world_size == 1:
            del peers["within a node"]
        for mib in arguments.sizes or _SIZES_MIB[device.type]:
            payload = torch.ones(mib * _MIB // 4, device=device)
            seconds = _seconds(partial(dist.all_reduce, payload), device)
            # Bus bandwidth as nccl-tests count it: independent of the number of ranks.
            bus = 2 * (place.world_size - 1) / place.world_size * mib / 1024 / seconds
            say(f"all-reduce, {mib:4} MiB: {bus:8.2f} GiB/s of bus bandwidth")
            for name, peer in peers.items():
                if peer < place.world_size:
                    seconds = _seconds(partial(_send, payload, peer), device)
                    say(f"rank 0 to {peer}, {name}, {mib:4} MiB: {mib / 1024 / seconds:8.2f} GiB/s")
        losses, resumed = _train_and_resume(cfg, runtime, arguments.folder)
    if not is_first_rank():
        return ExitCode.DONE  # the first rank's verdict is the job's
    with own_runtime(cfg.runtime_setting, ProcessPlace(0, 1, 0, 1, "single")) as alone:
        wanted = _losses(build_training_run(cfg, alone), _STEPS)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    allowed = _TOLERANCE[device.type]
    again = resumed == losses[_SAVED_AT:]
    found = "bit-equal" if again else f"{resumed}, and without {losses[_SAVED_AT:]}"
    compared = f"{_STEPS} steps on all ranks and in one process: losses within {worst:.1e} ({allowed:.0e} allowed)"
    continued = f"saved at step {_SAVED_AT}, resumed: the losses of {_STEPS - _SAVED_AT} steps are {found}"
    verdicts = {compared: worst < allowed, continued: again}
    for text, passed in verdicts.items():
        say(f"{'passed' if passed else 'FAILED'}: {text}")
    return ExitCode.DONE if all(verdicts.values()) else ExitCode.FAILED


def _configuration(world_size: int) -> "RunConfig":
    """A small model, and a global batch that all ranks share evenly."""
    from nemo_llm.config.compose.load import compose

    return compose([
        "+model=gpt_tiny", "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "data=mock",
        "data.seq_length=64", "precision=fp32", "trainer.deterministic=true", "trainer.micro_batch_size=1",
        f"trainer.global_batch_size={world_size * max(1, 16 // world_size)}", f"trainer.max_steps={_STEPS}",
        "optim.sched.warmup_steps=2", f"optim.sched.decay_steps={_STEPS}",
    ])  # fmt: skip


def _train_and_resume(cfg: "RunConfig", runtime: "ParallelRuntime", parent: Path) -> tuple[list[float], list[float]]:
    """Losses of 20 steps, and of those after the checkpoint once more from it; it is written to a new folder."""
    import torch.distributed as dist

    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import CheckpointSaver, load_checkpoint
    from nemo_llm.training.setup import build_training_run

    made = [""]
    if runtime.is_first_rank:
        parent.mkdir(parents=True, exist_ok=True)
        made = [tempfile.mkdtemp(prefix="selftest_", dir=parent.absolute())]
        write_config(Path(made[0]), to_plain(cfg))
    dist.broadcast_object_list(made, src=0)
    run = build_training_run(cfg, runtime)
    run.run_dir = Path(made[0])
    losses = _losses(run, _SAVED_AT)
    saved = CheckpointSaver(run).save(run, in_background=False)
    losses += _losses(run, _STEPS - _SAVED_AT)
    run = build_training_run(cfg, runtime)
    load_checkpoint(run, saved)
    resumed = _losses(run, _STEPS - _SAVED_AT)
    if runtime.is_first_rank:
        shutil.rmtree(made[0])
    return losses, resumed


def _losses(run: "TrainingRun", steps: int) -> list[float]:
    from nemo_llm.training.step import train_step

    return [train_step(run).loss for _ in range(steps)]


def _send(payload: object, peer: int) -> None:
    """One message from rank 0 to `peer`; the other ranks do nothing."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        dist.send(payload, peer)
    elif dist.get_rank() == peer:
        dist.recv(payload, 0)


def _seconds(work: Callable[[], object], device: object) -> float:
    """Mean time of `work` on all ranks, after one call that connects."""
    import torch
    import torch.distributed as dist

    for repeats in (1, _REPEATS):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        dist.barrier()
        if torch.device(str(device)).type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / _REPEATS


if __name__ == "__main__":
    sys.exit(main())
