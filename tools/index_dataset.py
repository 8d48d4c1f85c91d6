"""Text in, Megatron's ``.bin``/``.idx`` out.

    python tools/index_dataset.py input=FILE_OR_GLOB output_prefix=PREFIX tokenizer=gpt2 workers=2

All keys with their defaults: conf/index_dataset.yaml. Interrupted at any moment, the same command goes on.
"""

import sys
import time
from pathlib import Path

from nemo_llm.config.commands.data import IndexConfig
from nemo_llm.config.commands.entry import run_tool
from nemo_llm.data.index.build import IndexJob, IndexProgress, build_index
from nemo_llm.data.index.plan import IndexSettings
from nemo_llm.storage.build_cache import cache_folder


def main(arguments: list[str]) -> int:
    """Run the tool; returns the exit code."""
    return run_tool("index_dataset", IndexConfig, index, arguments)


def index(config: IndexConfig) -> None:
    """Index, and print what came of it."""
    began = time.monotonic()
    manifest = build_index(_job(config), _Printer())
    seconds = time.monotonic() - began
    print(
        f"{config.output_prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens "
        f"({manifest['dtype']}), encoded by {manifest['encoded_by']}, in {seconds:.1f} s"
    )
    for reason, count in manifest["bad_records"].items():
        print(f"left out: {count:,} x {reason}")
    for example in manifest["bad_examples"]:
        print(f"  {example}")


def _job(config: IndexConfig) -> IndexJob:
    settings = IndexSettings(
        tokenizer=config.data.tokenizer,
        text_key=config.text_key,
        plain_text=config.plain_text,
        encoding=config.encoding,
        append_eod=config.append_eod,
        on_bad_record=config.on_bad_record,
    )
    return IndexJob(
        inputs=[config.input] if isinstance(config.input, str) else config.input,
        prefix=Path(config.output_prefix).expanduser(),
        settings=settings,
        cache=cache_folder(config.cache_dir),
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        fast_path=config.fast_path,
        overwrite=config.overwrite,
        restart=config.restart,
    )


class _Printer:
    """Prints progress every few seconds."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def __call__(self, progress: IndexProgress) -> None:
        if time.monotonic() - self._printed > 5:
            self._printed = time.monotonic()
            rate = progress.report.tokens / max(progress.seconds, 1e-9)
            print(
                f"{progress.shards_done}/{progress.shards} shards, {progress.report.documents:,} documents, "
                f"{progress.report.tokens:,} tokens, {rate:,.0f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
