"""From raw text to a trained model, killed with SIGKILL again and again in each of its three commands.

``python -m benchmarks.data_pipeline_kills --kills 100 --seed 1``. A journey prepares, indexes and trains on numbered
documents, some of them twice. Each command is killed several times, half of the kills at a random time and half at a
random file operation below the journey's folder, and then let to its end. In the end every document must be in the
prepared files exactly once, the indexed dataset must hold each exactly once and be byte for byte that of a run that
nobody disturbed, and so must the losses of training be, bit by bit.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoint_kills import kill_at_file_operation, losses
from nemo_llm.assets import resolve_path
from nemo_llm.corpus.documents import read_documents

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8
KILLS_A_COMMAND = 3
RULES = ["data_prep=dedup_only", "data_prep.minhash.n_grams=3", "tasks=5"]
TRAINING = [
    "+model=gpt_tiny", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2", "model.num_layers=1",
    "tokenizer=demo", "data.seq_length=64", f"trainer.max_steps={STEPS}", "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2", "trainer.log_interval=1", "trainer.deterministic=true", "trainer.accelerator=cpu",
    "checkpoint.save_interval=2", "checkpoint.keep_last=2", "exp_manager.enabled=false", "sample.enabled=false",
]  # fmt: skip

Command = Callable[[list[str]], int]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pipeline_kills_"))
    counts = trials(folder, arguments.kills, arguments.seed)
    for name, count in sorted(counts.items()):
        print(f"  {name:40} {count}")
    shutil.rmtree(folder)
    return int(any(name.startswith("FAILED") for name in counts))


def trials(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Run journeys until ``kills`` kills were made; returns how often what happened."""
    commands = load_commands()
    numbers = write_input(folder / "in.jsonl")
    choose = random.Random(seed)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    seconds = {}
    for name, command in commands.items():
        started = time.monotonic()
        code = attempt(command, arguments_of(name, folder, folder / "undisturbed", 0), folder / "undisturbed", None)
        assert code == 0, (folder / "undisturbed/log").read_text()[-3000:]
        seconds[name] = time.monotonic() - started
    problem = judge(folder / "undisturbed", folder / "undisturbed", numbers)
    assert not problem, problem
    while counts["kills"] < kills:
        journey = folder / f"journey_{counts['journeys']}"
        counts["journeys"] += 1
        for name, command in commands.items():
            code = 1
            for _ in range(KILLS_A_COMMAND):
                moment = choose.uniform(0, seconds[name]) if choose.random() < 0.5 else choose.randint(1, 150)
                workers = choose.choice((0, 0, 0, 1))
                code = attempt(command, arguments_of(name, folder, journey, workers), journey, moment)
                if code == 0:
                    counts[f"{name}: reached the end before the kill"] += 1
                    break
                if code != -signal.SIGKILL:
                    break
                counts["kills"] += 1
                counts[f"{name}: kills"] += 1
            if code == -signal.SIGKILL:
                code = attempt(command, arguments_of(name, folder, journey, 0), journey, None)
            if code:
                print(f"{journey}: {name} ended with {code}\n{(journey / 'log').read_text()[-3000:]}", file=sys.stderr)
                break
        problem = f"exit code {code}" if code else judge(journey, folder / "undisturbed", numbers)
        counts[f"FAILED journeys: {problem}" if problem else "journeys without a document lost or repeated"] += 1
        if not problem:
            shutil.rmtree(journey)
        print(f"{counts['journeys']} journeys, {counts['kills']} kills {problem}", flush=True)
    counts["seconds"] = round(time.monotonic() - began)
    return counts


def load_commands() -> dict[str, Command]:
    """The three commands, with everything imported that they need: each attempt is forked from here."""
    import torch

    import nemo_llm.training.setup  # noqa: F401
    from nemo_llm.config.commands.entry import run_entry_point
    from nemo_llm.train import main as train

    torch.set_num_threads(
        1
    )  # OpenMP's threads, that an import may have started, don't survive a fork: a run would hang
    commands: dict[str, Command] = {}
    for name in ("prepare_data", "index_dataset"):
        specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert specification is not None
        assert specification.loader is not None
        tool = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(tool)
        commands[name] = tool.main
    commands["train"] = lambda arguments: run_entry_point(train, arguments)
    return commands


def arguments_of(name: str, folder: Path, journey: Path, workers: int) -> list[str]:
    """The arguments of a command in a journey."""
    match name:
        case "prepare_data":
            return [f"input={folder}/in.jsonl", f"output={journey}/clean", f"workers={workers}", *RULES]
        case "index_dataset":
            return [
                f"input={journey}/clean/documents", f"output_prefix={journey}/indexed", "tokenizer=demo", "fast_path=false",
                f"workers={workers}", f"cache_dir={folder}/cache",
            ]  # fmt: skip
    blend = f"data.blend=[{{name: mine, prefix: {journey}/indexed}}]"
    return [*TRAINING, blend, f"run.dir={journey}/run", f"data.cache_dir={folder}/cache"]


def write_input(path: Path) -> list[str]:
    """Numbered documents, every fifth of them twice; returns the numbers in order."""
    chapters = [document.text for document in read_documents(resolve_path("asset:moby_dick", "text"), "text")]
    numbers = [f"#{number}#" for number in range(len(chapters))]
    texts = [f"{number} {text[:1500]}" for number, text in zip(numbers, chapters, strict=True)]
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[::5]]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return numbers


def attempt(command: Command, arguments: list[str], journey: Path, moment: float | int | None) -> int:
    """Run a command in a forked process, killed at ``moment`` (seconds, or the number of a file operation)."""
    journey.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(command, arguments, journey, moment if isinstance(moment, int) else None)
    if isinstance(moment, float):
        until = time.monotonic() + moment
        while time.monotonic() < until and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(command: Command, arguments: list[str], journey: Path, kill_at: int | None) -> None:
    descriptor = os.open(journey / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if kill_at is not None:
        kill_at_file_operation(journey, kill_at)
    code = 1
    try:
        code = command(arguments)
    except BaseException as error:  # the parent goes by the exit code, and a reader by the log
        print(repr(error), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def judge(journey: Path, undisturbed: Path, numbers: list[str]) -> str:
    """Return what is wrong with a finished journey, or nothing."""
    files = sorted((journey / "clean/documents").iterdir())
    found = Counter(
        re.match("#[0-9]+#", json.loads(line)["text"]).group()  # type: ignore[union-attr]
        for file in files
        for line in file.read_text().splitlines()
    )
    if sorted(found.elements()) != sorted(numbers):
        return "documents lost or repeated in preparing"
    for suffix in (".bin", ".idx"):
        if Path(f"{journey}/indexed{suffix}").read_bytes() != Path(f"{undisturbed}/indexed{suffix}").read_bytes():
            return "another dataset"
    if decoded(journey) != [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]:
        return "the dataset does not hold the prepared documents"
    if [step for step, *_ in losses(journey / "run")] != list(range(1, STEPS + 1)):
        return "steps lost or repeated"
    if losses(journey / "run") != losses(undisturbed / "run"):
        return "other losses"
    left = {path.name for path in journey.iterdir()}
    expected = {"clean", "indexed.bin", "indexed.idx", "indexed.manifest.json", "run", "log"}
    return "" if left == expected else f"left over: {sorted(left - expected)}"


def decoded(journey: Path) -> list[str]:
    """The documents of the indexed dataset as text."""
    import yaml

    from nemo_llm.config.compose.catalog import conf_dir
    from nemo_llm.config.sections.data import TokenizerConfig
    from nemo_llm.data.index.format import IndexedDataset
    from nemo_llm.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TokenizerConfig(**yaml.safe_load((conf_dir() / "tokenizer/demo.yaml").read_text())))
    data = IndexedDataset(journey / "indexed")
    return [tokenizer.decode(data.document(number).tolist()[:-1]) for number in range(data.num_documents)]


if __name__ == "__main__":
    sys.exit(main())
