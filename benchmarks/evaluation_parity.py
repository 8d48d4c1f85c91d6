"""lm-eval's own Hugging Face backend and ours on the same tasks in one run: every example's score, and the time.

    python -m benchmarks.evaluation_parity HF_FOLDER CHECKPOINT --lambada FILE --blimp FOLDER --gsm8k FILE [--limit 200]

The MMLU-style file is made of GSM8K's questions: the right number and three others as choices A to D.
"""

import argparse
import csv
import json
import random
import tempfile
import time
import warnings
from pathlib import Path


def make_mmlu(gsm8k: Path, target: Path, count: int) -> None:
    generator = random.Random(11)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for line in gsm8k.read_text(encoding="utf-8").splitlines()[:count]:
            record = json.loads(line)
            right = record["answer"].split("####")[1].strip()
            number = int(right.replace(",", ""))
            others = generator.sample(
                [n for n in (number + d for d in (-10, -3, -2, -1, 1, 2, 4, 10)) if n != number], 3
            )
            choices = [right, *map(str, others)]
            generator.shuffle(choices)
            writer.writerow([record["question"], *choices, "ABCD"[choices.index(right)]])


def plain_folder(folder: Path, target: Path) -> Path:
    """The model without the note that it came from a quantised file, which lm-eval's backend stumbles over."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def scores(results: dict) -> dict[str, list]:
    return {task: [sample["resps"] for sample in rows] for task, rows in results["samples"].items()}


def flatten(value: object) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flatten(item)]
    return [] if isinstance(value, bool) else [float(value)]


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("hf_folder")
    parser.add_argument("checkpoint")
    parser.add_argument("--lambada", required=True)
    parser.add_argument("--blimp", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval's backend; ours fills batches by tokens")
    arguments = parser.parse_args()

    from lm_eval.models.huggingface import HFLM

    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.evaluate import EvaluateConfig
    from nemo_llm.evaluation.harness import build_lm, evaluate, find_task_files
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.inference.scoring import ModelScorer
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    with tempfile.TemporaryDirectory() as folder:
        mmlu = Path(folder) / "mmlu.csv"
        make_mmlu(Path(arguments.gsm8k), mmlu, arguments.limit)
        files = {"lambada": arguments.lambada, "mmlu": str(mmlu), "blimp": arguments.blimp}
        tasks = find_task_files(files, {})
        cfg = compose_tool(
            "evaluate", EvaluateConfig, [f"checkpoint={arguments.checkpoint}", f"accelerator={arguments.device}"]
        )
        opened = open_checkpoint(cfg, Path(arguments.checkpoint), 1)
        model = load_model(opened, start_runtime(opened.runtime), "sizes")
        hf = HFLM(
            pretrained=str(plain_folder(Path(arguments.hf_folder), Path(folder) / "hf")),
            device=arguments.device,
            dtype="float32",
            batch_size=arguments.batch_size,
            max_length=model.max_length,
        )
        ours_lm = build_lm(ModelScorer(model, 8), prefix_id=hf.prefix_token_id)
        print(
            "| task | examples | accuracy: lm-eval's | ours | largest difference of a score | seconds: lm-eval's | ours |"
        )
        print("|---|---|---|---|---|---|---|")
        total = [0.0, 0.0]
        for task in tasks:
            times, found = [], []
            for lm in (hf, ours_lm):
                began = time.perf_counter()
                found.append(evaluate(lm, [task], arguments.limit, None))
                times.append(time.perf_counter() - began)
            theirs, ours = (flatten(scores(result)[task.name]) for result in found)
            accuracies = [result["results"][task.name]["acc,none"] for result in found]
            worst = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
            count = len(found[0]["samples"][task.name])
            print(
                f"| {task.name} | {count} | {accuracies[0]:.4f} | {accuracies[1]:.4f} | {worst:.1e} | {times[0]:.0f} | {times[1]:.0f} |",
                flush=True,
            )
            total = [a + b for a, b in zip(total, times, strict=False)]
        print(f"| all | | | | | {total[0]:.0f} | {total[1]:.0f} |")
        stop_runtime()


if __name__ == "__main__":
    main()
