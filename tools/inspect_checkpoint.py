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
from nemo_llm.errors import ExitCode, NemoLlmError


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show_parser = commands.add_parser("show")
    show_parser.add_argument("path", type=Path)
    show_parser.add_argument("--norms", action="store_true", help="read every tensor and print its norm")
    verify_parser = commands.add_parser("verify")
    verify_parser.add_argument("path", type=Path)
    verify_parser.add_argument("--how", choices=("full", "sampled", "sizes"), default="full")
    diff_parser = commands.add_parser("diff")
    diff_parser.add_argument("first", type=Path)
    diff_parser.add_argument("second", type=Path)
    diff_parser.add_argument("--all", action="store_true", help="print every tensor that differs, not the first alone")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "show":
            return _show(chosen.path, chosen.norms)
        if chosen.command == "verify":
            return _verify(chosen.path, chosen.how)
        return _diff(chosen.first, chosen.second, chosen.all)
    except NemoLlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT


def _show(path: Path, norms: bool) -> int:
    from nemo_llm.checkpoint.inspect import show  # torch takes seconds to import, which --help need not pay

    for line in show(path, norms):
        print(line)
    return ExitCode.DONE


def _verify(path: Path, how: str) -> int:
    code = ExitCode.DONE
    for folder in find_checkpoints(path) or [resolve_checkpoint(path)]:
        try:
            print(f"whole    {folder} ({verify(folder, how) / 2**20:,.1f} MiB read)")
        except NemoLlmError as error:
            code = ExitCode.BAD_INPUT
            print(f"damaged  {folder}: {error}")
    return code


def _diff(first: Path, second: Path, everything: bool) -> int:
    from nemo_llm.checkpoint.inspect import diff

    count = 0
    for difference in diff(first, second):
        count += 1
        if everything or count == 1:
            print(f"{difference.name}: {difference.what}")
    print(f"{count} tensors differ" if count else "equal bit by bit in every tensor")
    return ExitCode.FAILED if count else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
