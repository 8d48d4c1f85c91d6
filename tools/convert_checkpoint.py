"""Weights from one format to another, proven by comparing logits before the result appears.

    python tools/convert_checkpoint.py source_format=hf target_format=nemo_llm input=HF_FOLDER output=CHECKPOINT
    python tools/convert_checkpoint.py source_format=nemo_llm target_format=hf input=RUN output=HF_FOLDER

All keys with their defaults: conf/convert_checkpoint.yaml. What is in the input is never changed, and the output folder
appears whole or not at all.
"""

import sys

from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.entry import run_tool


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return run_tool("convert_checkpoint", ConvertConfig, convert, arguments)


def convert(cfg: ConvertConfig) -> None:
    """Convert, and print how it went."""
    # Imported here: torch takes seconds, which --help need not pay.
    if "peft" in (cfg.source_format, cfg.target_format):
        from nemo_llm.convert.peft_adapters import convert_adapter as convert_any
    else:
        from nemo_llm.convert.convert import convert as convert_any
    outcome = convert_any(cfg)
    rate = outcome.num_bytes / 2**20 / max(outcome.seconds, 1e-9)
    print(f"{outcome.output}: {outcome.num_bytes / 2**20:,.1f} MiB in {outcome.seconds:.1f} s ({rate:,.0f} MiB/s)")
    print(outcome.gate if outcome.gate is not None else "gate: not run (verify=false)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
