"""Add tokens to a trained model and its tokenizer, before training goes on with texts that have them.

    python tools/extend_vocabulary.py BASE OUTPUT --tokens TOKENS.txt

``BASE`` is a run or a checkpoint (tools/convert_checkpoint.py makes one of a Hugging Face folder), ``TOKENS.txt`` has a
token a line. ``OUTPUT`` is a checkpoint of weights for +model=from_checkpoint, every other tool, and export.
"""

import argparse
import sys
from pathlib import Path

from nemo_llm.config.commands.entry import options_of, run_options
from nemo_llm.corpus.documents import read_lines
from nemo_llm.errors import InputError


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    parser = options_of(__doc__)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="a token a line")
    parser.add_argument(
        "--start",
        choices=("pieces", "mean"),
        default="pieces",
        help="new rows: the mean of the tokens that the word was written with so far, or of all tokens",
    )
    parser.add_argument("--special", action="store_true", help="control tokens, never read from ordinary text")
    parser.set_defaults(run_command=_extend)
    return run_options(parser, arguments)


def _extend(options: argparse.Namespace) -> None:
    tokens = _read(options.tokens)
    from nemo_llm.convert.vocabulary import extend_vocabulary

    size = extend_vocabulary(options.base, options.output, tokens, options.start, options.special)
    print(f"{options.output}: {len(tokens)} tokens more, a vocabulary of {size:,}")


def _read(path: Path) -> list[str]:
    """A token a line, as it stands there but for a carriage return at its end.

    Raises:
        InputError: no such file, or a token with white space around it, which is hardly meant.
    """
    if not path.is_file():
        raise InputError(f"--tokens {path}: there is no such file")
    tokens = list(read_lines(path))
    for number, token in tokens:
        if token != token.strip():
            raise InputError(f"--tokens {path}, line {number}: {token!r} begins or ends with white space; remove it")
    return [token for _, token in tokens]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
