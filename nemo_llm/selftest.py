"""First day on a new cluster: ``sbatch slurm/selftest.sh``. How fast do the ranks reach each other?

Prints the bandwidth of all-reduce, and of messages from rank 0 to a rank of its node and of another node, by size.
It starts the same process groups as training does, so that what is wrong with the fabric shows here first.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from nemo_llm.errors import ExitCode
from nemo_llm.log import is_first_rank

_SIZES_MIB = {"cuda": (1, 16, 256), "cpu": (1, 16)}
_REPEATS = 5
_MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", type=int, nargs="*", help="message sizes in MiB")
    arguments = parser.parse_args(argv)

    import torch
    import torch.distributed as dist

    from nemo_llm.config.load import compose
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    runtime = start_runtime(compose(["+model=gpt_tiny"]))
    try:
        place, device = runtime.place, runtime.device
        _say(f"{place.world_size} ranks on {place.num_nodes} nodes, {dist.get_backend()}, torch {torch.__version__}")
        peers = {"within a node": 1, "across nodes": place.local_world_size}
        if place.local_world_size == 1:
            del peers["within a node"]
        for mib in arguments.sizes or _SIZES_MIB[device.type]:
            payload = torch.ones(mib * _MIB // 4, device=device)
            seconds = _seconds(partial(dist.all_reduce, payload), device)
            # Bus bandwidth as nccl-tests count it: independent of the number of ranks.
            bus = 2 * (place.world_size - 1) / place.world_size * mib / 1024 / seconds
            _say(f"all-reduce, {mib:4} MiB: {bus:8.2f} GiB/s of bus bandwidth")
            for name, peer in peers.items():
                if peer < place.world_size:
                    seconds = _seconds(partial(_send, payload, peer), device)
                    _say(f"rank 0 to {peer}, {name}, {mib:4} MiB: {mib / 1024 / seconds:8.2f} GiB/s")
    finally:
        stop_runtime()
    return ExitCode.DONE


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


def _say(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
