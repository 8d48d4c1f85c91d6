"""What can be done with a trained adapter besides training on: export it for Hugging Face's ``peft``, or merge it.

    python tools/peft_adapter.py export RUN OUTPUT --base-model NAME_OR_PATH
    python tools/peft_adapter.py merge RUN OUTPUT

``RUN`` is a run folder or one of its checkpoints. ``export`` writes ``adapter_config.json`` and
``adapter_model.safetensors``; ``merge`` writes a checkpoint of plain weights, from base and adapter, for
tools/convert_checkpoint.py and every other tool. To start a run from a folder of ``peft``: ``peft.init_from=FOLDER``.
"""

import argparse
import sys
import warnings
from pathlib import Path

from nemo_llm.errors import ExitCode, NemoLlmError
from nemo_llm.log import configure_logging


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    options = _parser().parse_args(arguments)
    configure_logging()
    warnings.filterwarnings("ignore", module=r"megatron\.")  # it says at every start what is not installed
    try:
        options.run_command(options)
    except NemoLlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("export", _export, "as a folder that plain peft loads"),
        ("merge", _merge, "into the weights, as a checkpoint"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(run_command=run)
        sub.add_argument("run", type=Path, metavar="RUN")
        sub.add_argument("output", type=Path, metavar="OUTPUT")
        if name == "export":
            sub.add_argument("--base-model", metavar="NAME", help="noted in adapter_config.json")
    return parser


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
