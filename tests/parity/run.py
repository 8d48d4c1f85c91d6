"""Print the parity table: every layout beside one process. ``python -m tests.parity.run [--model gpt_tiny]``."""

import argparse
import math
import time

from tests.parity.layouts import DENSE, MOE, train_losses
from tests.ranks import RankPool


def largest_difference(reference: list, other: list) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient norm over the steps; infinite where one is no number."""
    pairs = list(zip(reference, other, strict=True))
    differences = [[abs(a[i] - b[i]) / abs(a[i]) for a, b in pairs] for i in (0, 1)]
    loss, norm = (math.inf if any(map(math.isnan, of_steps)) else max(of_steps) for of_steps in differences)
    return loss, norm


def main() -> None:
    """Run the layouts of both models and print one row each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["gpt_tiny", "moe_tiny"])
    parser.add_argument("--only")
    parser.add_argument("--extra", nargs="*", default=[])
    arguments = parser.parse_args()
    pool = RankPool(4)
    for model, layouts in (("gpt_tiny", DENSE), ("moe_tiny", MOE)):
        if arguments.model not in (None, model):
            continue
        reference = pool.run(train_losses, 1, model, (), tuple(arguments.extra))[0]
        print(model, reference[0], reference[-1], flush=True)
        for layout in layouts:
            if arguments.only and arguments.only not in layout.name:
                continue
            start = time.perf_counter()
            try:
                results = pool.run(train_losses, layout.processes, model, layout.overrides, tuple(arguments.extra))
            except AssertionError as error:
                print(f"| {model} | {layout.name} | {layout.processes} | FAILED {str(error)[-1500:]}", flush=True)
                continue
            loss, norm = largest_difference(reference, results[0])
            seconds = time.perf_counter() - start
            print(
                f"| {model} | {layout.name} | {layout.processes} | {loss:.1e} | {norm:.1e} | {seconds:.0f} s |",
                flush=True,
            )
    pool.close()


if __name__ == "__main__":
    main()
