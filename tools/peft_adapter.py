"""What can be done with a trained adapter besides training on: export it for Hugging Face's ``peft``, or merge it.

    python tools/peft_adapter.py export RUN OUTPUT --base-model NAME_OR_PATH
    python tools/peft_adapter.py merge RUN OUTPUT

``RUN`` is a run folder or one of its checkpoints. ``export`` writes ``adapter_config.json`` and
``adapter_model.safetensors``; ``merge`` writes a checkpoint of plain weights, from base and adapter, for
tools/convert_checkpoint.py and every other tool. To start a run from a folder of ``peft``: ``peft.init_from=FOLDER``.
"""

import argparse
import sys
from pathlib import Path

from nemo_llm.config.commands.entry import add_command, options_of, run_options


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = options_of(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = add_command(commands, "export", _export, "as a folder that plain peft loads")
    for command in (export, add_command(commands, "merge", _merge, "into the weights, as a checkpoint")):
        command.add_argument("run", type=Path, metavar="RUN")
        command.add_argument("output", type=Path, metavar="OUTPUT")
    export.add_argument("--base-model", metavar="NAME", help="noted in adapter_config.json")
    return run_options(parser, arguments)


def _export(options: argparse.Namespace) -> None:
    from nemo_llm.checkpoint.folder import resolve_checkpoint
    from nemo_llm.peft.hf_format import export_adapter

    settings = export_adapter(resolve_checkpoint(options.run), options.output, options.base_model)
    size = sum(path.stat().st_size for path in options.output.iterdir()) / 2**20
    print(f"{options.output}: {settings['peft_type']}, {size:,.1f} MiB")


def _merge(options: argparse.Namespace) -> None:
    from nemo_llm.convert.peft_adapters import merge_checkpoint

    print(f"{merge_checkpoint(options.run, options.output)}: weights alone")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
