"""Conversion of a real model, measured: speed beside a plain copy and beside transformers, and equality on real text.

    python -m benchmarks.convert_real --hf HF_FOLDER --text wikitext2_test.txt [--tokens 16384]

Needs room for three copies of the model. Figures: docs/benchmarks-models.md.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "The three laws of thermodynamics are",
    "To bake bread, you first",
    "In 1969, the first humans",
    "Water boils at",
    "The best way to learn a language is",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,",
]
NEW_TOKENS = 64
WINDOW = 512


def timed_copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy of the weights, brought to the disk."""
    began = time.perf_counter()
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


LOAD_THEN_SAVE = """
import sys, time, torch
from transformers import AutoModelForCausalLM
began = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
print(time.perf_counter() - began)
"""

CONVERT = """
import sys, time, resource
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.convert.convert import convert
way = sys.argv[3:5]
arguments = [f"source_format={way[0]}", f"target_format={way[1]}", f"input={sys.argv[1]}", f"output={sys.argv[2]}"]
cfg = compose_tool("convert_checkpoint", ConvertConfig, [*arguments, "verify=false", "overwrite=true"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
convert(cfg)
seconds = time.perf_counter() - began
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def run_python(code: str, *arguments: object) -> list[float]:
    """Numbers that the code prints on its last line, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(word) for word in output.strip().splitlines()[-1].split()]


def measure_speed(hf: Path, folder: Path, repeats: int) -> None:
    """Copy, conversion both ways and transformers, in turns; the median of each."""
    size = sum(path.stat().st_size for path in hf.glob("*.safetensors")) / 2**20
    rows: dict[str, list[float]] = {"copy": [], "hf to nemo_llm": [], "nemo_llm to hf": [], "transformers": []}
    memory = 0.0
    for _ in range(repeats):
        for name in ("copied", "saved"):
            shutil.rmtree(folder / name, ignore_errors=True)
        rows["copy"].append(timed_copy(hf, folder / "copied"))
        seconds, used = run_python(CONVERT, hf, folder / "ours", "hf", "nemo_llm")
        rows["hf to nemo_llm"].append(seconds)
        memory = max(memory, used)
        rows["nemo_llm to hf"].append(run_python(CONVERT, folder / "ours", folder / "back", "nemo_llm", "hf")[0])
        # Of what we wrote: the input may say that it came from quantised weights, which transformers does not save.
        rows["transformers"].append(run_python(LOAD_THEN_SAVE, folder / "back", folder / "saved")[0])
    medians = {name: sorted(times)[len(times) // 2] for name, times in rows.items()}
    for name, seconds in medians.items():
        share, speedup = medians["copy"] / seconds, medians["transformers"] / seconds
        print(f"| {name} | {seconds:.2f} s | {size / seconds:,.0f} MiB/s | {share:.0%} of copy | {speedup:.1f} |")
    print(f"memory of the conversion above that at its start: {memory:,.0f} MiB (mapped pages of the input included)")


def perplexity(logits_of: Any, ids: torch.Tensor) -> float:
    """Per token, in windows that do not see each other."""
    losses, count = 0.0, 0
    for first in range(0, len(ids) - 1, WINDOW):
        window = ids[first : first + WINDOW + 1]
        logits = logits_of(window[None, :-1])[0]
        losses += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return float(torch.tensor(losses / count).exp())


def measure_equality(hf: Path, ours: Path, text: Path, tokens: int) -> None:
    """Greedy continuations and perplexity of both models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_llm.checkpoint.saved_run import SavedRun
    from nemo_llm.convert.logit_check import float32_model, forward_ours, saved_model

    tokenizer = AutoTokenizer.from_pretrained(hf)
    theirs: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    with float32_model(saved_model(SavedRun.open(ours))) as chunk, torch.no_grad():
        from nemo_llm.checkpoint.weights import load_weights

        load_weights([chunk], ours)
        equal = 0
        for prompt in PROMPTS:
            start = tokenizer(prompt, return_tensors="pt").input_ids
            whole = theirs.generate(start, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            # What ours would say at each place, given the same words so far: the same as generating step by step.
            logits = forward_ours(chunk, whole[:, :-1]).logits[0]
            logits[:, theirs.generation_config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
            said = logits.argmax(-1)
            equal += int(torch.equal(said[start.shape[1] - 1 :], whole[0, start.shape[1] :]))
        print(f"greedy: {equal} of {len(PROMPTS)} prompts, {NEW_TOKENS} tokens each, are the same token for token")
        ids = torch.tensor(tokenizer(text.read_text()).input_ids[: tokens + 1])
        print(f"perplexity over {len(ids) - 1} tokens in windows of {WINDOW}:")
        print(f"  transformers {perplexity(lambda x: theirs(x).logits.float(), ids):.5f}")
        print(f"  nemo_llm     {perplexity(lambda x: forward_ours(chunk, x).logits, ids):.5f}")


def main() -> None:
    """Run all of it and print the figures."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.hf.parent) as name:
        folder = Path(name)
        measure_speed(arguments.hf, folder, arguments.repeats)
        measure_equality(arguments.hf, folder / "ours", arguments.text, arguments.tokens)
    print(f"largest resident size {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
