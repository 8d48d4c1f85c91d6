"""From samples on disk to tensors on this rank's device."""

import dataclasses

import numpy as np
import torch

from nemo_llm.config import RunConfig
from nemo_llm.data.build import DataSets, open_data, short_vocabulary
from nemo_llm.data.loader import MicroBatch, MicroBatchLoader
from nemo_llm.data.sampling.sample import Sample, SampleSource
from nemo_llm.errors import InputError
from nemo_llm.models.layers.context_parallel import take_local_chunks
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.tokenizers.tokenizer import Tokenizer, load_tokenizer


class DeviceBatches:
    """Micro-batches of one source for this rank, on its device and cut for context parallelism."""

    def __init__(
        self,
        source: SampleSource,
        cfg: RunConfig,
        runtime: ParallelRuntime,
        prefetch: int,
        vocab_size: int | None = None,
    ) -> None:
        """``vocab_size`` is the model's, where that is less than the tokenizer's: then ids may be beyond it."""
        self.source, self.runtime, self.vocab_size = source, runtime, vocab_size
        self.loader = MicroBatchLoader(
            source,
            dp_rank=runtime.dp_rank,
            dp_size=runtime.dp_size,
            micro_batch_size=cfg.trainer.micro_batch_size,
            prefetch=prefetch,
        )

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data since the start."""
        return self.loader.wait_seconds

    def micro_batches(self, first_sample: int, num_samples: int) -> list[dict[str, torch.Tensor]]:
        """The ``num_samples`` samples from ``first_sample`` on that are this data-parallel rank's, by micro-batch.

        Raises:
            InputError: a token id that the model has no row for; on a GPU that would be an assertion on the device.
        """
        batches = self.loader.micro_batches(first_sample, num_samples)
        return [self._to_device(self._checked(batch, first_sample, num_samples)) for batch in batches]

    def _checked(self, batch: MicroBatch, first_sample: int, num_samples: int) -> MicroBatch:
        if self.vocab_size is None:
            return batch
        tokens, labels = batch["tokens"], batch["labels"]
        largest = tokens.max() if labels.dtype == np.float32 else max(tokens.max(), labels.max())  # scores are no ids
        if largest >= self.vocab_size:
            raise InputError(
                f"samples {first_sample} to {first_sample + num_samples - 1} hold token id {largest}, but the model "
                f"knows {self.vocab_size}; set model.vocab_size to {largest + 1} or more, or to null"
            )
        return batch

    def _to_device(self, arrays: MicroBatch) -> dict[str, torch.Tensor]:
        runtime = self.runtime
        cp = runtime.parallelism.context_parallel_size
        batch = {}
        for name, array in arrays.items():
            if array is None:
                continue
            tensor = torch.from_numpy(array)
            if runtime.device.type == "cuda":
                tensor = tensor.pin_memory().to(runtime.device, non_blocking=True)
            # Attention needs the document numbers of the whole sequence.
            batch[name] = tensor if name == "document_ids" else take_local_chunks(tensor, runtime.cp_rank, cp, dim=1)
        return batch


class PaddedSource:
    """A finite source that goes on with samples that count for nothing, so that its last global batch is whole."""

    def __init__(self, source: SampleSource) -> None:
        self.source, self.seq_length = source, source.seq_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index < len(self.source):
            return self.source[index]
        last = self.source[len(self.source) - 1]
        return dataclasses.replace(last, loss_mask=np.zeros_like(last.loss_mask))


def build_loaders(
    cfg: RunConfig, runtime: ParallelRuntime
) -> tuple[Tokenizer, DataSets, DeviceBatches, dict[str, DeviceBatches]]:
    """Tokenizer, the data sets themselves, and the batches of the training and of each validation set.

    Raises:
        InputError: files that are missing or damaged, or that hold token ids beyond the vocabulary.
    """
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    sets, short = open_data(cfg.data, cfg.model_setting, tokenizer), short_vocabulary(cfg.model, tokenizer)
    train = DeviceBatches(sets.train, cfg, runtime, cfg.data.prefetch, short)
    validation = {
        name: DeviceBatches(PaddedSource(source), cfg, runtime, 0, short)
        for name, source in sets.validation.items()
        if len(source) > 0
    }
    return tokenizer, sets, train, validation
