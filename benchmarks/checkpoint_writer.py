"""Serialise, hash and write against ``dd``: ``python -m benchmarks.checkpoint_writer [--folder DIR] [--repeat 6]``.

Two threads write 0.8 GB of tensors as the checkpoint writer does, each file brought to the disk; then two ``dd`` write the
same amount with fsync. The turns alternate, since a shared disk changes its speed. Also what hashing costs.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nemo_llm.checkpoint.manifest import BlockHasher
from nemo_llm.checkpoint.state_files import StateFile


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--repeat", type=int, default=6)
    arguments = parser.parse_args()
    tensors = [torch.randn(8 << 20) for _ in range(24)]
    files = [arguments.folder / f"checkpoint_writer_{number}" for number in range(2)]
    total = sum(tensor.numel() * 4 for tensor in tensors) / 1e9
    rates: dict[str, list[float]] = {"writer": [], "dd": []}
    for _ in range(arguments.repeat):
        for name, work in (("writer", write), ("dd", dd)):
            began = time.perf_counter()
            work(files, tensors)
            rates[name].append(total / (time.perf_counter() - began))
            for file in files:
                file.unlink()
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:8} median {middle[name]:.2f} GB/s of {[round(value, 2) for value in values]}")
    print(f"the writer reaches {middle['writer'] / middle['dd']:.0%} of dd")
    hashed, plain = serialise(tensors[0], True), serialise(tensors[0], False)
    print(
        f"serialising on one core {plain:.2f} GB/s, with XXH3 {hashed:.2f} GB/s: hashing is {1 - hashed / plain:.0%} of it"
    )
    began = time.perf_counter()
    hashlib.sha256(memoryview(tensors[0].numpy()).cast("B")).digest()
    print(f"SHA-256 alone {tensors[0].numel() * 4 / 1e9 / (time.perf_counter() - began):.2f} GB/s")
    return 0


def write(files: list[Path], tensors: list[torch.Tensor]) -> None:
    def one(number: int) -> None:
        with StateFile(files[number]) as file:
            for tensor in tensors[number::2]:
                file.append(tensor)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))


def dd(files: list[Path], tensors: list[torch.Tensor]) -> None:
    count = sum(tensor.numel() * 4 for tensor in tensors) >> 24
    running = [
        subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={file}", "bs=8M", f"count={count}", "conv=fsync"], stderr=subprocess.DEVNULL
        )
        for file in files
    ]
    for process in running:
        process.wait()


def serialise(tensor: torch.Tensor, hashed: bool) -> float:
    """GB/s of ``torch.save`` into nothing, with and without the hash; the best of five."""

    class Nothing:
        def __init__(self) -> None:
            self.hasher = BlockHasher()

        def write(self, data: Any) -> int:
            if hashed:
                self.hasher.update(data)
            return len(data)

        def flush(self) -> None:
            pass

    best = 0.0
    for _ in range(5):
        stream: Any = Nothing()
        began = time.perf_counter()
        torch.save(tensor, stream)
        best = max(best, tensor.numel() * 4 / 1e9 / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    sys.exit(main())
