"""Layouts over NCCL against the losses of one CPU process: ``torchrun --nproc-per-node 2 -m benchmarks.gpu_parity``.

The layouts of tests/parity that have as many processes as were started; each one changes the layout in place. With
``--legal FILE`` every layout that the checks allow, for a dense model, one with experts and one with latent attention;
``python -m tests.parity.legal --reference FILE`` writes the file on a CPU.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_llm.launcher import find_process_place
from nemo_llm.parallel.runtime import clear_layout, stop_runtime
from tests.parity.layouts import DENSE, MOE, Layout, train_losses
from tests.parity.legal import MODELS, STEPS, legal_layouts

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden"
# fp32 on both, but cuBLAS and SDPA add in another order than the CPU does, and Adam carries that on.
TOLERANCE = 2e-4
ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Print one row a layout; the exit code is 1 when one differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--legal", type=Path, help="figures of one process on a CPU")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="with --legal: these alone")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many; NCCL keeps 2.7 GiB of a GPU a layout")
    arguments = parser.parse_args()
    legal = arguments.legal is not None
    cases = _legal_layouts(arguments.legal, arguments.model or list(MODELS)) if legal else _golden_layouts()
    worst_of_all = 0.0
    fitting = (case for case in cases if case[1].processes == find_process_place().world_size)
    for name, layout, wanted, call in itertools.islice(fitting, arguments.skip, None):
        began = time.perf_counter()
        model, overrides, steps = call
        found = train_losses(model, (*overrides, *layout.overrides), (f"trainer.accelerator={ACCELERATOR}",), steps)
        loss, norm = (max(abs(a[i] - b[i]) / abs(b[i]) for a, b in zip(found, wanted, strict=True)) for i in (0, 1))
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - began
            print(f"PARITY | {name} | {layout.name} | {loss:.1e} | {norm:.1e} | {seconds:.0f} s", flush=True)
        worst_of_all = max(worst_of_all, loss, norm)
        clear_layout()
    stop_runtime()
    return int(worst_of_all > TOLERANCE)


_Case = tuple[str, Layout, list, tuple[str, tuple[str, ...], int]]


def _golden_layouts() -> Iterator[_Case]:
    for model, layouts in (("gpt_tiny", DENSE), ("moe_tiny", MOE)):
        wanted = json.loads((GOLDEN / f"{model}_fp32.json").read_text())["steps"]
        for layout in layouts:
            yield model, layout, wanted, (model, (), len(wanted))


def _legal_layouts(reference: Path, models: list[str]) -> Iterator[_Case]:
    wanted = json.loads(reference.read_text())
    for name in models:
        model, extra = MODELS[name]
        for layout in legal_layouts(name):
            yield name, layout, wanted[name], (model, extra, STEPS)


if __name__ == "__main__":
    sys.exit(main())
