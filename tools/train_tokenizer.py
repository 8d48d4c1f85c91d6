"""A tokenizer trained on a sample of the corpus, with a report of how well it fits each source.

    python tools/train_tokenizer.py input='{plays: asset:shakespeare}' output=tokenizers/mine vocab_size=4000

All keys with their defaults: conf/train_tokenizer.yaml.
"""

import sys
from pathlib import Path

from nemo_llm.config.commands.data import TrainTokenizerConfig, compose_tool
from nemo_llm.errors import ExitCode, NemoLlmError
from nemo_llm.tokenizers.training import report, take_samples, train_tokenizer, write_report


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__)
        return ExitCode.DONE
    try:
        config = compose_tool("train_tokenizer", TrainTokenizerConfig, arguments)
        samples = take_samples(config)
        tokenizer = train_tokenizer(config, samples)
        figures = report(tokenizer, samples)
        write_report(Path(config.output).expanduser(), figures)
    except NemoLlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{config.output}: {figures['vocab_size']:,} ids, {figures['used']:.1%} of them used by the sample")
    print(f"{'source':<20} {'tokens/word':>12} {'bytes/token':>12} {'single bytes':>13} {'round trip':>11}")
    for name, row in figures["sources"].items():
        print(
            f"{name:<20.20} {row['tokens_per_word']:>12.3f} {row['bytes_per_token']:>12.3f} "
            f"{row['single_byte']:>13.4%} {row['round_trip']:>11.1%}"
        )
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
