"""Does a run that is killed, stopped and moved compute what an undisturbed one does? ``python -m benchmarks.checkpoint_lives``

In each layout 20 steps at once, against 7 steps, ``kill -9``, 6 more, SIGTERM, and 7 more: losses, gradient norms and
all weights must be equal bit by bit, with packed documents, a blend, dropout and bf16. Then one run that moves
from TP2 x PP2 over DP4 to one process, in fp32 without dropout: equal within 1e-5. Ranks are real processes.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoint_kills import OPTIONS, free_port, losses, train
from nemo_llm.checkpoint.inspect import diff

STEPS, KILL_AFTER, STOP_AFTER = 20, 7, 13
COMMON = [
    f"trainer.max_steps={STEPS}",
    "trainer.val_interval=null",
    "checkpoint.save_interval=1",
    "model.hidden_size=64",
]
ZERO1 = "parallelism.use_distributed_optimizer=true"


def sizes(**keys: object) -> list[str]:
    """Overrides of the parallelism section."""
    return [
        f"parallelism.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()
    ]


TP2 = sizes(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = sizes(pipeline_model_parallel_size=2)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "DP2, distributed optimizer": (2, []),
    "DP2, not distributed optimizer": (2, sizes(use_distributed_optimizer=False)),
    "DP2, late parameter gathering": (2, sizes(overlap_grad_reduce=True, overlap_param_gather=True)),
    "TP2 SP": (2, TP2),
    "PP2": (2, PP2),
    "PP2 VPP2": (2, [*PP2, *sizes(virtual_pipeline_model_parallel_size=2)]),
    "CP2": (2, sizes(context_parallel_size=2, cp_comm_type="all_gather")),
    "EP2 (moe_tiny)": (2, ["+model=moe_tiny", *sizes(expert_model_parallel_size=2)]),
    "TP2 x PP2": (4, [*TP2, *PP2]),
}
MOVES = [("TP2 x PP2", KILL_AFTER), ("DP4", STOP_AFTER), ("one process", STEPS)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    import nemo_llm.training.setup  # noqa: F401  once for all runs, which are forked from here

    folder = Path(tempfile.mkdtemp(prefix="checkpoint_lives_"))
    wrong = 0
    for name, (ranks, overrides) in LAYOUTS.items():
        if arguments.only and name not in arguments.only:
            continue
        outcome = same_layout(folder, ranks, overrides)
        wrong += "equal" not in outcome
        print(f"{name:34} {outcome}", flush=True)
    if not arguments.only or "move" in arguments.only:
        outcome = moved(folder)
        wrong += "WRONG" in outcome
        print(f"{' -> '.join(name for name, _ in MOVES):34} {outcome}")
    shutil.rmtree(folder)
    return int(wrong > 0)


def same_layout(folder: Path, ranks: int, overrides: list[str]) -> str:
    """Compare an undisturbed run with one of three lives."""
    for name in ("whole", "lives"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if code := live(folder / "whole", ranks, overrides, None):
        return f"WRONG: exit code {code}: {(folder / 'whole/log').read_text()[-600:]}"
    codes = [
        live(folder / "lives", ranks, overrides, (KILL_AFTER, signal.SIGKILL)),
        live(folder / "lives", ranks, overrides, (STOP_AFTER, signal.SIGTERM)),
        live(folder / "lives", ranks, overrides, None),
    ]
    if codes != [-9, 75, 0]:
        return f"WRONG: exit codes {codes}: {(folder / 'lives/log').read_text()[-600:]}"
    wanted, found = losses(folder / "whole"), losses(folder / "lives")
    if wanted != found:
        return f"WRONG: first difference {next((a, b) for a, b in zip(wanted, found, strict=False) if a != b)}"
    differences = list(diff(folder / "whole", folder / "lives"))
    return f"WRONG: {differences[0]}" if differences else f"{len(found)} losses, norms and all tensors bit-equal"


def moved(folder: Path) -> str:
    """One run through three layouts, against one process all the way."""
    exact = ["precision=fp32", "model.hidden_dropout=0.0", "optim.lr=3e-4"]
    places = {**LAYOUTS, "DP4": (4, [])}
    for name in ("whole", "moved"):
        shutil.rmtree(folder / name, ignore_errors=True)
    live(folder / "whole", 1, exact, None)
    for layout, until in MOVES:
        ranks, overrides = places[layout]
        code = live(folder / "moved", ranks, [*overrides, *exact, f"trainer.max_steps={until}"], None)
        if code:
            return f"WRONG: {layout}: exit code {code}: {(folder / 'moved/log').read_text()[-600:]}"
    pairs = list(zip(losses(folder / "whole"), losses(folder / "moved"), strict=True))
    worst = max(abs(a - b) / abs(a) for one, other in pairs for a, b in zip(one[1:], other[1:], strict=True))
    return (
        f"{'WRONG: ' if worst > 1e-5 else ''}largest relative difference of {len(pairs)} losses and norms {worst:.1e}"
    )


def live(run_dir: Path, ranks: int, overrides: Sequence[str], end: tuple[int, signal.Signals] | None) -> int:
    """Train until done, or until the signal in ``end`` is sent after its step; returns the first rank's exit code."""
    run_dir.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), run_dir / "log"
    own_model = any(option.startswith("+model") for option in overrides)
    options = [option for option in OPTIONS if not (own_model and option.startswith("+model"))]
    options = [*[o for o in overrides if o.startswith("+")], *options, *COMMON, "model.num_layers=4"]
    later = {o.split("=")[0]: o for o in overrides if not o.startswith("+")}  # an override replaces, it does not follow
    options = [*(o for o in options if o.split("=")[0] not in later), *later.values()]
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            train(run_dir, log, (rank, ranks, port), None, options)
        children.append(pid)
    if end is not None:
        while (
            last_step(run_dir) < end[0]
            and os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        for child in children if end[1] == signal.SIGKILL else children[-1:]:  # one rank's notice is enough to stop all
            os.kill(child, end[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[0]


def last_step(run_dir: Path) -> int:
    """Step of the last whole row of ``metrics.jsonl``."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
