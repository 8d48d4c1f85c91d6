"""Another project's configuration becomes a model file of ours, with a report of what became of every key.

    python tools/import_config.py input=5b.yaml output=my_conf name=gpt3_5b
    python -m nemo_llm.train --config-dir my_conf +model=gpt3_5b

Reads training files of NeMo-Framework-Launcher (YAML) and Megatron-LM's arguments (a text or a shell script). All keys
with their defaults: conf/import_config.yaml. Ends with code 3 where something of the file was not taken over.
"""

import sys
from collections import Counter
from pathlib import Path

from nemo_llm.config.commands.convert import ImportConfig
from nemo_llm.config.commands.entry import run_tool
from nemo_llm.errors import ExitCode, InputError, NemoLlmError


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return run_tool("import_config", ImportConfig, import_config, arguments)


def import_config(wanted: ImportConfig) -> ExitCode:
    """Import one file, and print what became of every key."""
    from nemo_llm.config.checks import find_problems
    from nemo_llm.config.compose.load import compose
    from nemo_llm.migrate.configs import import_file, model_file

    source = Path(wanted.input).expanduser()
    name = wanted.name or source.stem
    folder = Path(wanted.output).expanduser()
    target = folder / "model" / f"{name}.yaml"
    if target.exists() and not wanted.overwrite:
        raise InputError(f"{target}: exists already; give another name, or overwrite=true")
    result = import_file(source, wanted.format)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(model_file(result, name, source.name), encoding="utf-8")
    for row in result.rows:
        print(row)
    counts = Counter(row.became for row in result.rows)
    print(", ".join(f"{count} {became}" for became, count in counts.items()))
    try:
        cfg = compose([f"+model={name}"], folder)  # what it says is decoded strictly, and mistakes are told here
    except NemoLlmError:
        print(f"{target}: written, but it does not make a configuration yet")
        raise
    print(f"{target}: use it with --config-dir {folder} +model={name}")
    processes = max((cfg.trainer.devices or 1) * (cfg.trainer.num_nodes or 1), cfg.parallelism.model_parallel_size)
    for problem in find_problems(cfg, processes):
        print(f"to mend before training on {processes} processes: {problem}")
    if counts["unmapped"] and not wanted.allow_unmapped:
        print(f"{counts['unmapped']} unmapped: look at them; allow_unmapped=true ends with code 0", file=sys.stderr)
        return ExitCode.INCOMPLETE
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
