"""Look into checkpoints without starting a run, on CPU.

    python tools/inspect_checkpoint.py show   CHECKPOINT [--norms]
    python tools/inspect_checkpoint.py verify CHECKPOINT [--how full|sampled|sizes]
    python tools/inspect_checkpoint.py diff   CHECKPOINT CHECKPOINT [--all]

CHECKPOINT is a run folder, its checkpoints/ folder (the newest in it; verify takes all) or one step_*. Exit code 0:
whole, or equal bit by bit; 1: they differ; 2: damaged or not found.
"""

import argparse
import sys
from pathlib import Path

from nemo_llm.checkpoint.folder import find_checkpoints, resolve_checkpoint
from nemo_llm.checkpoint.manifest import verify
from nemo_llm.config.commands.entry import add_command, options_of, run_options
from nemo_llm.errors import ExitCode, NemoLlmError


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = options_of(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = add_command(commands, "show", _show, "step, model, layout and every tensor")
    show.add_argument("path", type=Path)
    show.add_argument("--norms", action="store_true", help="read every tensor and print its norm")
    verified = add_command(commands, "verify", _verify, "compare the files with their hashes")
    verified.add_argument("path", type=Path)
    verified.add_argument("--how", choices=("full", "sampled", "sizes"), default="full")
    diff = add_command(commands, "diff", _diff, "compare the tensors of two checkpoints")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.add_argument("--all", action="store_true", help="print every tensor that differs, not the first alone")
    return run_options(parser, arguments)


def _show(options: argparse.Namespace) -> None:
    from nemo_llm.checkpoint.inspect import show  # torch takes seconds to import, which --help need not pay

    for line in show(options.path, options.norms):
        print(line)


def _verify(options: argparse.Namespace) -> int:
    code = ExitCode.DONE
    for folder in find_checkpoints(options.path) or [resolve_checkpoint(options.path)]:
        try:
            print(f"whole    {folder} ({verify(folder, options.how) / 2**20:,.1f} MiB read)")
        except NemoLlmError as error:
            code = ExitCode.BAD_INPUT
            print(f"damaged  {folder}: {error}")
    return code


def _diff(options: argparse.Namespace) -> int:
    from nemo_llm.checkpoint.inspect import diff

    count = 0
    for difference in diff(options.first, options.second):
        count += 1
        if options.all or count == 1:
            print(f"{difference.name}: {difference.what}")
    print(f"{count} tensors differ" if count else "equal bit by bit in every tensor")
    return ExitCode.FAILED if count else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
