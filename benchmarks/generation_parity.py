"""Greedy texts of one model by ``transformers.generate`` and by ours, token for token, with the time each takes.

    python -m benchmarks.generation_parity HF_FOLDER CHECKPOINT [--prompts 50] [--tokens 64]

Prompts are beginnings of passages of Moby Dick, of 3 to 60 words. Ours run alone and in batches of 16.
"""

import argparse
import json
import time
import warnings
from importlib import resources

import torch


def make_prompts(count: int) -> list[str]:
    text = resources.files("nemo_llm.assets").joinpath("text/moby_dick.jsonl").read_text(encoding="utf-8")
    words = " ".join(json.loads(line)["text"] for line in text.splitlines()).split()
    step = len(words) // count
    return [" ".join(words[i * step : i * step + 3 + (i * 7) % 58]) for i in range(count)]


def run_theirs(folder: str, prompts: list[str], tokens: int) -> tuple[list[list[int]], float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results, began = [], time.perf_counter()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        results.append(output[0, ids["input_ids"].shape[1] :].tolist())
    return results, time.perf_counter() - began


def run_ours(checkpoint: str, prompts: list[str], tokens: int, batch_sizes: list[int]) -> list:
    from pathlib import Path

    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.generate import GenerateConfig
    from nemo_llm.inference.decoder import generate
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    keys = [f"sampling.max_new_tokens={tokens}", "sampling.ignore_eod=true", "text=unused", "accelerator=cpu"]
    cfg = compose_tool("generate", GenerateConfig, [f"checkpoint={checkpoint}", *keys])
    opened = open_checkpoint(cfg, Path(checkpoint), 1)
    model = load_model(opened, start_runtime(opened.runtime), "sizes")
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    found = []
    for size in batch_sizes:
        began = time.perf_counter()
        results = generate(model, encoded, cfg.sampling, size)
        found.append(([result.tokens for result in results], time.perf_counter() - began))
    stop_runtime()
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("hf_folder")
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.prompts)
    theirs, seconds = run_theirs(arguments.hf_folder, prompts, arguments.tokens)
    count = arguments.prompts * arguments.tokens
    print("| way | equal texts | first difference | seconds | tokens/s |\n|---|---|---|---|---|")
    print(f"| transformers, alone | | | {seconds:.0f} | {count / seconds:.1f} |")
    for size, (ours, taken) in zip(
        (1, 16), run_ours(arguments.checkpoint, prompts, arguments.tokens, [1, 16]), strict=False
    ):
        same = sum(a == b for a, b in zip(theirs, ours, strict=False))
        first = min(
            (
                next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
                for a, b in zip(theirs, ours, strict=False)
                if a != b
            ),
            default=None,
        )
        print(f"| ours, batches of {size} | {same} of {len(prompts)} | {first} | {taken:.0f} | {count / taken:.1f} |")


if __name__ == "__main__":
    main()
