"""Indexing against Megatron-LM's own way, side by side: tokens/s, equal bytes, memory and disk.

    python benchmarks/data_indexing.py --input corpus.jsonl --workers 2 --tokenizer gpt2
    python benchmarks/data_indexing.py --input corpus.jsonl --tokenizer tokenizer.json | model.model

Megatron-LM's ``tools/preprocess_data.py`` reads lines in one process, calls a Hugging Face fast (or SentencePiece)
tokenizer for each document in a ``multiprocessing.Pool``, and writes with ``IndexedDatasetBuilder``. That is what
``--reference`` does here; its imports are not counted, ours are.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
_tokenizer: list = []


def _start(name: str) -> None:
    """Load the tokenizer as Megatron does, in a worker of the pool."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if name == "gpt2":
        from transformers import GPT2TokenizerFast

        folder = ROOT / "nemo_llm" / "assets" / "tokenizers" / "gpt2"
        fast = GPT2TokenizerFast(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
        _tokenizer.append((lambda text: fast(text).input_ids, fast.convert_tokens_to_ids("<|endoftext|>")))
    elif name.endswith(".json"):
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_file=name)
        _tokenizer.append((lambda text: fast(text, add_special_tokens=False).input_ids, _eod(fast)))
    else:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=name)
        _tokenizer.append((model.encode_as_ids, model.eos_id()))


def _eod(fast) -> int:
    return fast.convert_tokens_to_ids("<|endoftext|>")


def _encode(line: str) -> tuple[list[int], int]:
    encode, eod = _tokenizer[0]
    text = json.loads(line)["text"]
    return [*encode(text), eod], len(line)


def reference(options: argparse.Namespace, prefix: Path) -> float:
    """Index in Megatron-LM's way; returns the seconds from the start of the pool to the written index."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab = {"gpt2": 50257}.get(options.tokenizer)
    if vocab is None:
        _start(options.tokenizer)
        vocab = options.vocab_size
    began = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab))
    with multiprocessing.Pool(options.workers, _start, (options.tokenizer,)) as pool, open(options.input) as lines:
        for ids, _ in pool.imap(_encode, lines, 32):
            builder.add_document(torch.tensor(np.asarray(ids)), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - began


class _Watch:
    """Samples the largest memory of any process below this one, and the largest size of a folder."""

    def __init__(self, folder: Path) -> None:
        self.memory = self.disk = 0
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(0.1):
            for process in this.children(recursive=True):
                try:
                    self.memory = max(self.memory, process.memory_info().rss)
                except psutil.Error:
                    continue
            sizes = []
            for path in self._folder.rglob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            self.disk = max(self.disk, sum(sizes))


def ours(options: argparse.Namespace, prefix: Path, *extra: str) -> tuple[float, float, _Watch]:
    """Run the tool; returns seconds from command to exit, processor seconds of it and its workers, and the watch."""
    name = options.tokenizer
    command = [sys.executable, str(ROOT / "tools" / "index_dataset.py"), f"input={options.input}"]
    command += [f"output_prefix={prefix}", f"workers={options.workers}", *extra]
    if name.endswith(".json"):
        command += ["tokenizer=demo", f"data.tokenizer.path={name}", "data.tokenizer.eod_token='<|endoftext|>'"]
    elif name != "gpt2":
        command += ["tokenizer=demo", f"data.tokenizer.path={name}", "data.tokenizer.type=sentencepiece"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = os.times()
    began = time.perf_counter()
    with _Watch(prefix.parent) as watch:
        subprocess.run(command, env=environment, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, spent, watch


def main() -> None:
    """Run both and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="JSON lines with a field text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, a tokenizer.json or a SentencePiece .model")
    parser.add_argument("--vocab-size", type=int, default=0, help="of a tokenizer that is not gpt2")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--ordinary", action="store_true", help="also without the fast path")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        if not options.no_reference:
            seconds = reference(options, Path(folder) / "reference")
            rows.append(("Megatron-LM's way", seconds, float("nan"), None, "reference"))
        for label, extra in [("ours", ()), ("ours, fast_path=false", ("fast_path=false",))][: 1 + options.ordinary]:
            place = Path(folder) / f"ours{len(extra)}"
            place.mkdir()
            seconds, spent, watch = ours(options, place / "d", *extra)
            rows.append((label, seconds, spent, watch, place.name + "/d"))
        sizes = {row[0]: Path(folder, f"{row[4]}.bin").stat().st_size for row in rows}
        manifest = json.loads(Path(folder, f"{rows[-1][4]}.manifest.json").read_text())
        tokens = manifest["tokens"]
        print(f"{Path(options.input).stat().st_size / 1e6:.0f} MB, {tokens:,} tokens, {options.workers} workers")
        for label, seconds, spent, watch, name in rows:
            same = all(
                Path(folder, name + suffix).read_bytes() == Path(folder, rows[0][4] + suffix).read_bytes()
                for suffix in (".bin", ".idx")
            )
            line = f"{label:<24} {seconds:7.1f} s {tokens / seconds / 1e3:8.0f}k tokens/s, x{rows[0][1] / seconds:.2f}"
            if watch is not None:
                final = sizes[label] + Path(folder, name + ".idx").stat().st_size
                line += f", {spent:.1f} CPU s, {watch.memory / 2**20:.0f} MiB a process at most"
                line += f", peak disk {watch.disk / final:.3f} of the output"
            print(line, "" if same else "  DIFFERENT BYTES", flush=True)


if __name__ == "__main__":
    main()
