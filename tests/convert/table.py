"""Print the table of families and checks: ``python -m tests.convert.table [NAME ...]``. Every row is a real run."""

import sys
import tempfile
import time
from pathlib import Path

import torch

from nemo_llm.convert.hf_files import HfReader
from tests.convert.cases import CASES, Case
from tests.convert.parity import LAYOUTS, measure
from tests.convert.test_families import _convert_case, largest_differences
from tests.ranks import RankPool


def row(case: Case, ranks: RankPool) -> str:
    """Differences of logits and gradients in every layout, and how many tensors came back bit by bit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        converted = _convert_case(case, folder, ranks)
        with HfReader(converted.hf) as before, HfReader(folder / "back") as after:
            equal = sum(torch.equal(before.read(key), after.read(key)) for key in before.infos)
            back = f"{equal} of {len(before.infos)}"
        cells = []
        for number, (layout, (processes, overrides)) in enumerate(LAYOUTS.items()):
            if layout == "EP2" and not case.experts:
                cells.append("")
                continue
            output = folder / str(number)
            (output / "state").mkdir(parents=True)
            mixture = ("model.moe.moe_router_load_balancing_type=none",) if case.experts else ()
            ranks.run(measure, processes, str(converted.ours), str(output), (*overrides, *mixture))
            logits, grads = largest_differences(converted, output)
            cells.append(f"{logits:.0e} / {grads:.0e}")
        seconds = time.perf_counter() - began
        return f"| {case.name} | {' | '.join(cells)} | {back} | {seconds:.0f} s |"


def main() -> None:
    """One row for each case."""
    print(f"| model | {' | '.join(LAYOUTS)} | tensors back, bit-equal | time |")
    print("|---" * (len(LAYOUTS) + 3) + "|")
    for case in CASES:
        if sys.argv[1:] and case.name not in sys.argv[1:]:
            continue
        # Fresh processes for each row: every process group leaves threads of gloo behind, which keep a processor busy.
        ranks = RankPool(4)
        print(row(case, ranks), flush=True)
        ranks.close()


if __name__ == "__main__":
    main()
