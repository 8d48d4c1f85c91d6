"""Every kind of fine-tuning on the same conversations: trained parameters, peak memory, held-out loss, time.

    python -m benchmarks.peft_kinds BASE TRAIN.jsonl HELD_OUT.jsonl --keys question answer --steps 8

``BASE`` is a checkpoint of ours (tools/convert_checkpoint.py makes one). Each kind is a run of ``nemo_llm.train`` in a
process of its own, one after the other, on the same samples in the same order; the row ``base`` is the model as it is.
Learning rates are those that each kind is usually trained with, not tuned.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Kind and learning rate. A rate of 1e-12 leaves the weights as they are: what validation then says is the base's.
KINDS = {
    "base": 1e-12,
    "full": 2e-5,
    "lora": 2e-3,
    "dora": 2e-3,
    "ia3": 2e-2,
    "adapter": 2e-3,
    "prompt_tuning": 2e-2,
    "p_tuning": 1e-3,
}
VIRTUAL_TOKENS = 20


def main() -> None:
    """Run every kind that is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--keys", nargs=2, metavar=("PROMPT", "ANSWER"), help="fields of question and answer")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="samples a step")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--val-samples", type=int, default=8)
    options = parser.parse_args()
    print("| kind | learning rate | trained parameters | peak memory, GiB | held-out loss | seconds |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for kind in options.kinds:
        row = measure(options, kind)
        print(
            f"| {kind} | {KINDS[kind]:g} | {row['parameters']:,} | {row['gib']:.2f} | {row['loss']:.4f} | "
            f"{row['seconds']:.0f} |",
            flush=True,
        )


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One run: what it trained, the most memory that its process held, its last validation loss."""
    steps = 1 if kind == "base" else options.steps
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "nemo_llm.train", *arguments(options, kind, steps, folder)]
        began = time.perf_counter()
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            text = log.read()
        if process.returncode != 0:
            sys.exit(f"{kind} ended with {process.returncode}:\n{text[-3000:]}")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = [row["val_loss"] for row in rows if row.get("val_loss") is not None][-1]
    found = re.search(r"([\d,]+) trained parameters", text)
    trained = int(found[1].replace(",", "")) if found else 0
    parameters = 0 if kind == "base" else trained or whole_model(options.base)
    seconds = time.perf_counter() - began
    return {"parameters": parameters, "gib": usage.ru_maxrss / 2**20, "loss": loss, "seconds": seconds}


def arguments(options: argparse.Namespace, kind: str, steps: int, folder: str) -> list[str]:
    """The command line of one run."""
    keys = (
        [f"data.chat.prompt_key={options.keys[0]}", f"data.chat.answer_key={options.keys[1]}"] if options.keys else []
    )
    # Virtual tokens come on top, so that all kinds keep the same conversations; packed samples would differ.
    virtual = VIRTUAL_TOKENS if kind in ("prompt_tuning", "p_tuning") else 0
    peft = {"base": ["peft=ia3"], "full": []}.get(kind, [f"peft={kind}"])
    return [
        "+model=from_checkpoint",
        f"model.checkpoint_path={options.base}",
        "task=sft",
        "data=chat",
        f"data.blend=[{{name: train, chat: {options.train}}}]",
        f"data.validation={{held_out: [{{name: held_out, chat: {options.held_out}}}]}}",
        "data.split=null",
        f"data.seq_length={options.seq_length + virtual}",
        "data.packing=none",
        *keys,
        *peft,
        *([f"peft.num_virtual_tokens={virtual}"] if virtual else []),
        "precision=fp32",
        "trainer.accelerator=cpu",
        f"trainer.global_batch_size={options.batch}",
        f"trainer.max_steps={steps}",
        f"trainer.val_interval={steps}",
        f"trainer.val_steps={-(-options.val_samples // options.batch)}",
        f"optim.lr={KINDS[kind]}",
        "optim.sched.warmup_steps=0",
        f"optim.sched.decay_steps={options.steps}",
        "optim.sched.min_lr=0",
        "exp_manager.enabled=false",
        "checkpoint.save_final=false",
        f"run.dir={folder}/run",
    ]


def whole_model(checkpoint: str) -> int:
    """All weights of a checkpoint."""
    from nemo_llm.checkpoint.folder import resolve_checkpoint
    from nemo_llm.checkpoint.inspect import tensors

    found = tensors(resolve_checkpoint(Path(checkpoint)))
    return sum(_size(info) for name, info in found.items() if not name.startswith("optimizer."))


def _size(info: Any) -> int:
    count = 1
    for length in info.shape:
        count *= length
    return count


if __name__ == "__main__":
    main()
