"""Raw text in, cleaned, filtered and deduplicated documents out, with a report of what was dropped and why.

    python tools/prepare_data.py input='raw/*.jsonl.gz' output=clean/web workers=16
    python tools/index_dataset.py input=clean/web/documents output_prefix=indexed/web tokenizer=gpt2 workers=16

After an interruption the same command goes on. All keys with their defaults: conf/prepare_data.yaml; the rules:
conf/data_prep/. Needs the extra `data`: pip install 'nemo_llm[data]'.
"""

import sys
import time
from pathlib import Path

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.prepare import PrepareConfig
from nemo_llm.corpus.download import fetch_inputs
from nemo_llm.errors import InputError


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return run_tool("prepare_data", PrepareConfig, prepare_data, arguments)


def prepare_data(config: PrepareConfig) -> None:
    """Prepare, and print what was dropped."""
    try:
        from nemo_llm.corpus.prepare.plan import make_plan
        from nemo_llm.corpus.prepare.run import HowToRun, prepare
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install 'nemo_llm[data]'") from error
    began = time.monotonic()
    downloads = Path(config.download_dir or f"{config.output}.download").expanduser()
    printer = _Printer()
    patterns = fetch_inputs(config.inputs(), downloads, config.max_files, lambda *done: printer("download", *done))
    plan = make_plan(config, patterns)
    slurm = config.slurm if config.executor == "slurm" else None
    report = prepare(plan, HowToRun(config.workers, config.overwrite, config.restart, slurm), printer)
    if report is None:
        print(f"{len(plan.stages())} array jobs are in Slurm's queue; the last one writes {config.output}")
        return
    for note in report["not_applied"]:
        print(f"not applied: {note}")
    print(f"{'step':<28} {'in':>14} {'out':>14}  dropped")
    for step in report["steps"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in step["dropped"].items())
        print(f"{step['step']:<28} {step['in']:>14,} {step['out']:>14,}  {reasons}")
    kept, given = report["output"], report["input"]
    seconds = time.monotonic() - began
    print(
        f"{config.output}: {kept['documents']:,} of {given['documents']:,} documents, {kept['characters']:,} of "
        f"{given['characters']:,} characters, in {seconds:.1f} s; see {config.output}/report.html"
    )


class _Printer:
    """Prints where the work stands: each stage as it begins, then every few seconds."""

    def __init__(self) -> None:
        self._printed, self._stage = time.monotonic(), ""

    def __call__(self, stage: str, done: int, tasks: int) -> None:
        if stage != self._stage or time.monotonic() - self._printed > 5:
            self._printed, self._stage = time.monotonic(), stage
            print(f"{stage}: {done}/{tasks} {'files' if stage == 'download' else 'tasks'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
