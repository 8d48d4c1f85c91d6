"""From samples on disk to tensors on this rank's device."""

import torch

from nemo_llm.config import RunConfig
from nemo_llm.data.build import build_train_and_validation
from nemo_llm.data.loader import MicroBatchLoader
from nemo_llm.data.tokenizer import Tokenizer, load_tokenizer
from nemo_llm.models.context_parallel import take_local_chunks
from nemo_llm.parallel.runtime import ParallelRuntime


class DeviceBatches:
    """Micro-batches of one source for this rank, on its device and cut for context parallelism."""

    def __init__(self, loader: MicroBatchLoader, num_samples: int, runtime: ParallelRuntime) -> None:
        self.loader, self.num_samples, self.runtime = loader, num_samples, runtime

    def __len__(self) -> int:
        return self.num_samples

    def micro_batches(self, first_sample: int, num_samples: int) -> list[dict[str, torch.Tensor]]:
        """The ``num_samples`` samples from ``first_sample`` on that are this data-parallel rank's, by micro-batch."""
        return [self._to_device(batch) for batch in self.loader.micro_batches(first_sample, num_samples)]

    def _to_device(self, arrays: dict) -> dict[str, torch.Tensor]:
        runtime = self.runtime
        cp = runtime.parallelism.context_parallel_size
        batch = {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(array)
            if runtime.device.type == "cuda":
                tensor = tensor.pin_memory().to(runtime.device, non_blocking=True)
            # Attention needs the document numbers of the whole sequence.
            batch[name] = tensor if name == "document_ids" else take_local_chunks(tensor, runtime.cp_rank, cp, dim=1)
        return batch


def build_loaders(
    cfg: RunConfig, runtime: ParallelRuntime
) -> tuple[Tokenizer, DeviceBatches, dict[str, DeviceBatches]]:
    """Tokenizer, training data and validation sets.

    Raises:
        InputError: files that are missing or damaged, or that hold token ids beyond the vocabulary.
    """
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    sets = build_train_and_validation(cfg.data, tokenizer, cfg.trainer.seed)
    micro_batch_size = cfg.trainer.micro_batch_size

    def load(source) -> DeviceBatches:
        return DeviceBatches(
            MicroBatchLoader(source, runtime.dp_rank, runtime.dp_size, micro_batch_size), len(source), runtime
        )

    return tokenizer, load(sets.train), {name: load(source) for name, source in sets.validation.items()}
