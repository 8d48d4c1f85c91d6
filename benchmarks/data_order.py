"""The order of 1e9 samples, fetching samples, and best-fit packing: seconds, memory, samples a second.

    python benchmarks/data_order.py --prefix data/web            # an indexed dataset made with tokenizer=gpt2

The dataset is used as one source and as four; it is read often enough before to lie in the page cache.
"""

import argparse
import resource
import tempfile
import time

import numpy as np
import yaml

from nemo_llm.config.compose.catalog import conf_dir
from nemo_llm.config.sections.data import DataConfig, TokenizerConfig
from nemo_llm.config.sections.sources import IndexedSource
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.index.format import IndexedDataset
from nemo_llm.data.loader import MicroBatchLoader
from nemo_llm.data.sampling.packed_documents import best_fit
from nemo_llm.tokenizers.tokenizer import load_tokenizer

SAMPLES = 1_000_000_000
_WEIGHTS = (0.6, 0.25, 0.1, 0.05)


def config(prefix: str, sources: int, cache: str, **changes: object) -> DataConfig:
    """A data section over copies of one dataset."""
    keys = yaml.safe_load((conf_dir() / "data" / "demo.yaml").read_text(encoding="utf-8"))
    tokenizer = yaml.safe_load((conf_dir() / "tokenizer" / "gpt2.yaml").read_text(encoding="utf-8"))
    blend = tuple(IndexedSource(name=f"s{n}", weight=_WEIGHTS[n], path=prefix) for n in range(sources))
    keys |= {"tokenizer": TokenizerConfig(**tokenizer), "blend": blend, "blend_changes": (), "split": None}
    return DataConfig(**(keys | {"seq_length": 4096, "cache_dir": cache} | changes))


def megabytes() -> float:
    """Largest resident memory of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run all and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = load_tokenizer(config(options.prefix, 1, cache).tokenizer)
        build_train_and_validation(config(options.prefix, 1, cache), tokenizer, 1)  # the scan of ids, once a dataset
        IndexedDataset(options.prefix).tokens.sum()  # into the page cache
        for sources in (1, 4):
            before, began = megabytes(), time.perf_counter()
            train = build_train_and_validation(config(options.prefix, sources, cache), tokenizer, 1).train
            counts = train.counts(SAMPLES)
            for index in (0, SAMPLES // 2, SAMPLES - 1):
                train.locate(index)
            seconds = time.perf_counter() - began
            grown = megabytes() - before
            print(f"order of {SAMPLES:,} samples, {sources} sources: {seconds * 1e3:.1f} ms, +{grown:.1f} MB")
            assert sum(counts) == SAMPLES
        for label, changes in (
            ("windows", {}),
            ("windows with document resets", {"reset_position_ids": True, "reset_attention_mask": True}),
            ("best-fit packs", {"packing": "best_fit"}),
        ):
            for sources in (1, 4):
                train = build_train_and_validation(
                    config(options.prefix, sources, cache, **changes), tokenizer, 1
                ).train
                began, count = time.perf_counter(), 20_000
                for index in range(count):
                    train[index]
                print(f"{label}, {sources} sources: {count / (time.perf_counter() - began):,.0f} samples/s of 4096")
        train = build_train_and_validation(config(options.prefix, 4, cache), tokenizer, 1).train
        with MicroBatchLoader(train, dp_rank=0, dp_size=8, micro_batch_size=8, prefetch=4) as loader:
            began, count = time.perf_counter(), 0
            for batch in loader.micro_batches(0, 8 * 8 * 500):
                count += len(batch["tokens"])
            print(f"loader, micro-batches of 8: {count / (time.perf_counter() - began):,.0f} samples/s of 4096")
        lengths = np.minimum(4097, np.maximum(1, np.random.default_rng(1).lognormal(6, 1.2, 1_000_000).astype(int)))
        began = time.perf_counter()
        _, packs = best_fit(lengths, 4097)
        seconds = time.perf_counter() - began
        fill = lengths.sum() / (len(packs) * 4097)
        print(
            f"best-fit packing: {len(lengths) / seconds:,.0f} documents/s, packs {fill:.2%} full, {megabytes():.0f} MB"
        )


if __name__ == "__main__":
    main()
