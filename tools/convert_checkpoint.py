"""Weights from one format to another, proven by comparing logits before the result appears.

    python tools/convert_checkpoint.py source_format=hf target_format=nemo_llm input=HF_FOLDER output=CHECKPOINT
    python tools/convert_checkpoint.py source_format=nemo_llm target_format=hf input=RUN output=HF_FOLDER

All keys with their defaults: conf/convert_checkpoint.yaml. What is in the input is never changed, and the output folder
appears whole or not at all.
"""

import sys
import warnings
from typing import TYPE_CHECKING

from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.errors import ExitCode, NemoLlmError
from nemo_llm.log import configure_logging

if TYPE_CHECKING:
    from nemo_llm.convert.write_checkpoint import Outcome


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return ExitCode.DONE
    configure_logging()
    warnings.filterwarnings("ignore")  # Megatron says at every start what is not installed
    try:
        cfg = compose_tool("convert_checkpoint", ConvertConfig, arguments)
        outcome = _convert(cfg)
    except NemoLlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rate = outcome.num_bytes / 2**20 / max(outcome.seconds, 1e-9)
    print(f"{outcome.output}: {outcome.num_bytes / 2**20:,.1f} MiB in {outcome.seconds:.1f} s ({rate:,.0f} MiB/s)")
    print(outcome.gate if outcome.gate is not None else "gate: not run (verify=false)")
    return ExitCode.DONE


def _convert(cfg: ConvertConfig) -> "Outcome":
    # Imported here: torch takes seconds, which --help need not pay.
    if "peft" in (cfg.source_format, cfg.target_format):
        from nemo_llm.convert.peft_adapters import convert_adapter

        return convert_adapter(cfg)
    from nemo_llm.convert.convert import convert

    return convert(cfg)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
