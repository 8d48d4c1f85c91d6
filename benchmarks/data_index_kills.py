"""Indexing killed with SIGKILL at random moments until it is done, again and again: the result is that of one run.

python benchmarks/data_index_kills.py --kills 100
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemo_llm.assets import asset_names, resolve_path
from nemo_llm.corpus.documents import read_documents

ROOT = Path(__file__).resolve().parents[1]


def write_input(path: Path) -> None:
    """Some 9 MB of numbered documents of the shipped texts."""
    texts = [
        d.text for name in asset_names("text") for d in read_documents(resolve_path(f"asset:{name}", "text"), "text")
    ]
    lines = (json.dumps({"text": f"{number} {text}"}) for number, text in enumerate(texts * 4))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def digest(prefix: Path) -> str:
    """SHA-256 of both files."""
    return hashlib.sha256(Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()).hexdigest()


def main() -> None:
    """Run until enough kills have struck and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    choose = random.Random(options.seed)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    tool = [sys.executable, str(ROOT / "tools" / "index_dataset.py"), "tokenizer=demo"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder / "in.jsonl")
        common = [*tool, f"input={folder}/in.jsonl", f"cache_dir={folder}/cache"]
        subprocess.run([*common, f"output_prefix={folder}/whole"], env=environment, check=True)
        began = time.monotonic()
        subprocess.run([*common, f"output_prefix={folder}/timed"], env=environment, check=True)
        alone = time.monotonic() - began
        kills = rounds = 0
        while kills < options.kills:
            rounds += 1
            prefix = folder / f"killed{rounds}"
            while True:
                command = [*common, f"output_prefix={prefix}", f"workers={choose.choice((0, 1, 2))}"]
                process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
                try:
                    process.wait(timeout=choose.uniform(0.2, 1.1) * alone)
                    assert process.returncode == 0, process.returncode
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
            assert digest(prefix) == digest(folder / "whole")
            left = [path.name for path in folder.iterdir() if path.name.startswith(f"{prefix.name}.")]
            assert sorted(left) == [f"{prefix.name}{suffix}" for suffix in (".bin", ".idx", ".manifest.json")], left
        print(
            f"{rounds} datasets, {kills} kills: every one byte for byte that of an undisturbed run, nothing left over"
        )


if __name__ == "__main__":
    main()
