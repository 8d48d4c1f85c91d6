"""Are two fresh processes equal bit by bit in determinism mode, and what does the mode cost?

``python -m benchmarks.determinism [--model gpt_1b] [--steps 20] [--override key=value ...]``. Runs the same steps three
times in fresh processes, the first two with empty compile caches, the third with those of the second, and once
without the mode for its speed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gpt_1b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="determinism_"))
    options = [
        f"+model={arguments.model}", f"trainer.max_steps={arguments.steps}", "trainer.log_interval=1", "trainer.val_interval=null",
        "trainer.val_steps=1", "exp_manager.enabled=false", "sample.enabled=false", "checkpoint.save_interval=null",
        "checkpoint.save_final=false", *arguments.override,
    ]  # fmt: skip
    runs = [
        ("cold caches", "a", True),
        ("cold caches again", "b", True),
        ("warm caches", "b", True),
        ("mode off", "b", False),
    ]
    rows = []
    for number, (name, cache, deterministic) in enumerate(runs):
        run_dir = folder / str(number)
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONWARNINGS": "ignore",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor_{cache}"), "TRITON_CACHE_DIR": str(folder / f"triton_{cache}"),
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "nemo_llm.train",
            *options,
            f"run.dir={run_dir}",
            f"trainer.deterministic={str(deterministic).lower()}",
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-1500:]}")
            return 1
        steps = [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        rows.append(
            (
                name,
                [(row["loss"], row["grad_norm"]) for row in steps],
                median([row["step_time_seconds"] for row in steps[len(steps) // 2 :]]),
            )
        )
    shutil.rmtree(folder)
    base = rows[-1][2]
    print(
        f"{arguments.model}, {arguments.steps} steps; loss and gradient norm of every step compared with the first run's"
    )
    for name, values, seconds in rows:
        same = sum(a == b for a, b in zip(values, rows[0][1], strict=True))
        print(
            f"  {name:20} {same}/{len(values)} steps bit-equal   {seconds:.4f} s a step   {seconds / base - 1:+.1%} to the mode off"
        )
    return int(any(values != rows[0][1] for _, values, _ in rows[1:3]))


if __name__ == "__main__":
    sys.exit(main())
