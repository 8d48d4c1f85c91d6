"""Does bf16, does FP8 train as fp32 does? 200 steps of a few layers at full width, the same data and weights.

``python -m benchmarks.numerics [--model llama3_1b] [--layers 2] [--steps 200] [--with NAME=key=value,key=value ...]``.
Each variant runs in a process of its own; the table says how far its losses are from those of the fp32 run, by windows
of 50 steps, and how far two bf16 runs with other data orders are from each other: the noise to judge by.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16", "model.transformer_impl=torch"],
    "bf16, unfused": ["precision=bf16", "model.transformer_impl=torch", "performance.fused_kernels=false"],
    "FP8, torch backend": ["precision=fp8_tensorwise", "model.transformer_impl=torch"],
    "bf16, another seed": ["precision=bf16", "model.transformer_impl=torch", "trainer.seed=4321"],
}


def losses(arguments: argparse.Namespace, name: str, overrides: list[str], folder: Path) -> list[float]:
    """Train in a fresh process; the loss of each step."""
    file = folder / f"{name}.json".replace(" ", "_")
    command = [
        sys.executable, "-W", "ignore", "-m", "benchmarks.step_speed", f"+model={arguments.model}", "--warm", "0",
        "--steps", str(arguments.steps), "--losses", str(file), f"model.num_layers={arguments.layers}", "data.seq_length=2048",
        "trainer.micro_batch_size=2", "trainer.global_batch_size=2", f"trainer.max_steps={arguments.steps}",
        f"optim.sched.warmup_steps={min(20, arguments.steps // 10)}", f"optim.sched.decay_steps={arguments.steps}", "exp_manager.enabled=false",
        "sample.enabled=false", *overrides, *arguments.override,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return json.loads(file.read_text())


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama3_1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--with", dest="more", nargs="*", default=[], help="NAME=override,override")
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    variants = {name: VARIANTS[name] for name in arguments.only}
    for entry in arguments.more:
        name, _, overrides = entry.partition("=")
        variants[name] = overrides.split(",")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(arguments, name, overrides, Path(folder)) for name, overrides in variants.items()}
    exact = found["fp32"]
    window = min(50, arguments.steps)
    for name, values in found.items():
        last = sum(values[-window:]) / window
        pairs = list(zip(values, exact, strict=True))
        differences = [
            sum(abs(a - b) / b for a, b in pairs[i : i + window]) / window for i in range(0, len(pairs), window)
        ]
        mean = sum(a - b for a, b in pairs[-window:]) / window
        print(
            f"NUMERICS {name:22} last {window} steps: loss {last:.4f}, {mean:+.4f} from fp32; mean |difference| by windows: "
            + " ".join(f"{x:.2%}" for x in differences),
            flush=True,
        )


if __name__ == "__main__":
    main()
