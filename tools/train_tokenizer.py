"""A tokenizer trained on a sample of the corpus, with a report of how well it fits each source.

    python tools/train_tokenizer.py input='{plays: asset:shakespeare}' output=tokenizers/mine vocab_size=4000

All keys with their defaults: conf/train_tokenizer.yaml.
"""

import sys
from pathlib import Path

from nemo_llm.config.commands.data import TrainTokenizerConfig
from nemo_llm.config.commands.entry import run_tool
from nemo_llm.tokenizers.training import report, take_samples, train_tokenizer, write_report


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return run_tool("train_tokenizer", TrainTokenizerConfig, train, arguments)


def train(config: TrainTokenizerConfig) -> None:
    """Train, and print how well the tokenizer fits."""
    samples = take_samples(config)
    tokenizer = train_tokenizer(config, samples)
    figures = report(tokenizer, samples)
    write_report(Path(config.output).expanduser(), figures)
    print(f"{config.output}: {figures['vocab_size']:,} ids, {figures['used']:.1%} of them used by the sample")
    print(f"{'source':<20} {'tokens/word':>12} {'bytes/token':>12} {'single bytes':>13} {'round trip':>11}")
    for name, row in figures["sources"].items():
        print(
            f"{name:<20.20} {row['tokens_per_word']:>12.3f} {row['bytes_per_token']:>12.3f} "
            f"{row['single_byte']:>13.4%} {row['round_trip']:>11.1%}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
