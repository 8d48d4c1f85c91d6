"""Look at indexed datasets (``PREFIX.bin`` and ``PREFIX.idx``), merge and split them, and say what a run has read.

    python tools/inspect_dataset.py validate PREFIX [--tokenizer NAME]
    python tools/inspect_dataset.py decode PREFIX --documents 0,3:6
    python tools/inspect_dataset.py chat FILE --tokenizer NAME --template chatml --records 0:3
    python tools/inspect_dataset.py ledger --run runs/my_run --steps 100:110

``NAME`` is a tokenizer group (gpt2, demo, byte), a folder with a saved tokenizer, or a tokenizer.json; without it the
one in the dataset's manifest serves.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import yaml

from nemo_llm.checkpoint.saved_run import TOKENIZER_FILE_NAME, SavedRun
from nemo_llm.config.commands.entry import add_command, options_of, run_options
from nemo_llm.config.compose.catalog import conf_dir
from nemo_llm.config.sections.chat import ChatConfig
from nemo_llm.config.sections.data import TokenizerConfig
from nemo_llm.data.index import inspect
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.sources.chats import list_unused, show_chats
from nemo_llm.errors import InputError
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_from_folder


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return run_options(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = options_of(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help_text: str, *, many: bool = False) -> argparse.ArgumentParser:
        sub = add_command(commands, name, run, help_text)
        if many:
            sub.add_argument("prefixes", nargs="+", metavar="PREFIX")
        return sub

    validate = command("validate", _validate, "read everything; damaged files and ids out of range", many=True)
    validate.add_argument("--tokenizer", help="refuse ids beyond its vocabulary")
    command("counts", _counts, "documents, tokens, bytes", many=True)
    command("histogram", _histogram, "lengths of documents", many=True)
    command("checksum", _checksum, "compare the files with the manifest's SHA-256", many=True)
    decode = command("decode", _decode, "print documents as text")
    decode.add_argument("prefix", metavar="PREFIX")
    decode.add_argument("--documents", required=True, metavar="LIST", help="numbers and half-open ranges: 0,3:6")
    decode.add_argument("--tokenizer")
    merge = command("merge", _merge, "write one dataset with the documents of several", many=True)
    merge.add_argument("--output", required=True, metavar="PREFIX")
    split = command("split", _split, "write the documents of one dataset to several")
    split.add_argument("prefix", metavar="PREFIX")
    split.add_argument("--shares", required=True, metavar="A,B,...", help="shares of the documents, such as 99,1")
    split.add_argument("--outputs", required=True, nargs="+", metavar="PREFIX")
    chat = command("chat", _chat, "print conversations as the model sees them, what is learned in green")
    chat.add_argument("file", metavar="FILE", help="JSON lines or Parquet")
    chat.add_argument("--tokenizer", required=True)
    chat.add_argument("--template", default="tokenizer", help="tokenizer, a named one, or a Jinja file")
    chat.add_argument("--records", default="0", metavar="LIST", help="numbers and half-open ranges: 0,3:6")
    chat.add_argument("--fields", metavar="PROMPT,ANSWER", help="two fields that hold question and answer")
    chat.add_argument("--date", metavar="YYYY-MM-DD", help="what a template writes as today's date")
    chat.add_argument("--train-on", default="answers", choices=["answers", "last_answer", "all"])
    ledger = command("ledger", _ledger, "which documents were in these steps of a run, one JSON object a line")
    ledger.add_argument("--run", required=True, type=Path, metavar="DIR", help="a run folder")
    ledger.add_argument("--steps", required=True, metavar="A:B", help="steps, half-open; the first step is 1")
    return parser


def _validate(options: argparse.Namespace) -> None:
    for prefix in options.prefixes:
        given = options.tokenizer or ((inspect.read_manifest(prefix) or {}).get("tokenizer"))
        vocab_size = _tokenizer(options.tokenizer, prefix).vocab_size if given else None
        counts, largest = inspect.validate(prefix, vocab_size)
        bound = "no tokenizer to compare with" if vocab_size is None else f"below {vocab_size:,}"
        print(
            f"{prefix}: good; {counts.documents:,} documents, {counts.tokens:,} tokens, largest id {largest} ({bound})"
        )


def _counts(options: argparse.Namespace) -> None:
    print(f"{'documents':>14} {'sequences':>14} {'tokens':>18} {'dtype':>7} {'MB':>10}  prefix")
    for prefix in options.prefixes:
        counts = inspect.count(IndexedDataset(prefix))
        print(
            f"{counts.documents:>14,} {counts.sequences:>14,} {counts.tokens:>18,} {counts.dtype:>7} "
            f"{counts.bytes / 1e6:>10,.1f}  {prefix}"
        )


def _histogram(options: argparse.Namespace) -> None:
    for prefix in options.prefixes:
        print(f"{prefix}\n{inspect.histogram(IndexedDataset(prefix))}")


def _checksum(options: argparse.Namespace) -> None:
    for prefix in options.prefixes:
        print("\n".join(inspect.check_sums(prefix)))


def _decode(options: argparse.Namespace) -> None:
    tokenizer = _tokenizer(options.tokenizer, options.prefix)
    numbers = [number for part in options.documents.split(",") for number in _range(part, "--documents")]
    for number, text in inspect.decode(IndexedDataset(options.prefix), numbers, tokenizer):
        print(f"--- document {number}\n{text}")


def _chat(options: argparse.Namespace) -> None:
    tokenizer = _tokenizer(options.tokenizer, options.file)
    prompt_key, _, answer_key = (options.fields or "").partition(",")
    try:
        config = ChatConfig(
            template=options.template,
            train_on=options.train_on,
            too_long="error",
            system_prompt=None,
            prompt_key=prompt_key or None,
            answer_key=answer_key or None,
            date=options.date,
        )
    except ValueError as error:
        raise InputError(f"chat: {error}") from None
    numbers = {number for part in options.records.split(",") for number in _range(part, "--records")}
    for number, text, unused in show_chats(options.file, config, tokenizer, numbers):
        note = f" (not used: {list_unused(Counter(unused))})" if unused else ""
        print(f"--- record {number}{note}\n{text}")


def _merge(options: argparse.Namespace) -> None:
    counts = inspect.merge(options.output, options.prefixes)
    print(f"{options.output}: {counts.documents:,} documents, {counts.tokens:,} tokens")


def _split(options: argparse.Namespace) -> None:
    try:
        shares = [float(share) for share in options.shares.split(",")]
    except ValueError as error:
        raise InputError(f"--shares {options.shares}: give numbers and commas, such as 99,1") from error
    if len(shares) != len(options.outputs) or min(shares) < 0 or sum(shares) <= 0:
        raise InputError(f"--shares {options.shares}: one positive share for each of {len(options.outputs)} outputs")
    for output, counts in zip(options.outputs, inspect.split(options.prefix, shares, options.outputs), strict=True):
        print(f"{output}: {counts.documents:,} documents, {counts.tokens:,} tokens")


def _ledger(options: argparse.Namespace) -> None:
    from nemo_llm.config.sections.batch_ramp import build_batch_ramp
    from nemo_llm.data.build import open_data
    from nemo_llm.data.sampling.sample_provenance import ledger

    config = SavedRun.at(options.run).sections
    steps = _range(options.steps, "--steps")
    if not steps or steps.start < 1:
        raise InputError(f"--steps {options.steps}: give a half-open range of steps from 1 on, such as 1:11")
    ramp = build_batch_ramp(config.trainer.global_batch_size, config.trainer.rampup_batch_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    train = open_data(config.data, config.model_setting, tokenizer).train
    for step in steps:
        for entry in ledger(train, ramp.consumed_samples(step - 1), ramp.consumed_samples(step)):
            print(json.dumps({"step": step, **dataclasses.asdict(entry)}))


def _tokenizer(name: str | None, prefix: str) -> Tokenizer:
    """Return the named tokenizer, or the one of the dataset's manifest."""
    if name is None:
        manifest = inspect.read_manifest(prefix)
        if manifest is None or "config" not in manifest["tokenizer"]:
            raise InputError(f"{prefix}.manifest.json names no tokenizer; name it with --tokenizer")
        tokenizer = load_tokenizer(TokenizerConfig(**manifest["tokenizer"]["config"]))
        if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
            raise InputError(f"{prefix}: the tokenizer's files have changed since; name the right one with --tokenizer")
        return tokenizer
    group = conf_dir() / "tokenizer" / f"{name}.yaml"
    if group.is_file():
        return load_tokenizer(TokenizerConfig(**yaml.safe_load(group.read_text(encoding="utf-8"))))
    if (Path(name) / TOKENIZER_FILE_NAME).is_file():
        return load_tokenizer_from_folder(Path(name))
    demo = yaml.safe_load((conf_dir() / "tokenizer" / "demo.yaml").read_text(encoding="utf-8"))
    return load_tokenizer(TokenizerConfig(**(demo | {"name": name, "path": name})))


def _range(text: str, option: str) -> range:
    """Read ``5`` or ``3:6``."""
    try:
        first, colon, last = text.partition(":")
        return range(int(first), int(last)) if colon else range(int(first), int(first) + 1)
    except ValueError as error:
        raise InputError(f"{option} {text}: give a number or a half-open range such as 3:6") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
