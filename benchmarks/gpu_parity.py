"""Layouts over NCCL against the losses of one CPU process: ``torchrun --nproc-per-node 2 -m benchmarks.gpu_parity``.

The layouts of tests/parity that have as many processes as were started; each one changes the layout in place.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_llm.parallel.runtime import clear_layout, find_process_place, stop_runtime
from tests.parity.layouts import DENSE, MOE, train_losses

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden"
# fp32 on both, but cuBLAS and SDPA add in another order than the CPU does, and Adam carries that on.
TOLERANCE = 2e-4
ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Print one row a layout; the exit code is 1 when one differs."""
    worst_of_all = 0.0
    for model, layouts in (("gpt_tiny", DENSE), ("moe_tiny", MOE)):
        wanted = json.loads((GOLDEN / f"{model}_fp32.json").read_text())["steps"]
        for layout in layouts:
            if layout.processes != find_process_place().world_size:
                continue
            began = time.perf_counter()
            steps = train_losses(model, layout.overrides, (f"trainer.accelerator={ACCELERATOR}",))
            loss, norm = (max(abs(a[i] - b[i]) / abs(b[i]) for a, b in zip(steps, wanted, strict=True)) for i in (0, 1))
            if dist.get_rank() == 0:
                print(
                    f"PARITY | {model} | {layout.name} | {loss:.1e} | {norm:.1e} | {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
            worst_of_all = max(worst_of_all, loss, norm)
            clear_layout()
    stop_runtime()
    return int(worst_of_all > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
