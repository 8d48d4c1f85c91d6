"""Micro-batches for one data-parallel rank, prepared ahead in a background thread. Shapes: ``[b, s]``.

The loader's only state is ``consumed_samples``: a training step takes samples ``[consumed, consumed + global batch)``,
and its micro-batch ``m`` on data-parallel rank ``r`` holds the ``micro_batch_size`` samples from
``consumed + (m * dp_size + r) * micro_batch_size``. So the union over ranks depends on neither layout nor ramp.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from nemo_llm.data.sampling.sample import Sample, SampleSource


class MicroBatch(TypedDict):
    """The arrays of one micro-batch, each [b, s]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64] | NDArray[np.float32]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int32] | None
    padding: NDArray[np.bool_] | None


def collate(samples: list[Sample]) -> MicroBatch:
    """Stack samples into new arrays (never views of what samples share)."""
    tokens = np.stack([sample.tokens for sample in samples])
    labels = [sample.labels for sample in samples if sample.labels is not None]
    documents = [sample.document_ids for sample in samples if sample.document_ids is not None]
    full = np.zeros(len(tokens[0]) - 1, dtype=np.bool_)
    padded = any(sample.padding is not None for sample in samples)
    return MicroBatch(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        # Virtual tokens (negative ids) are never labels that count.
        labels=np.stack(labels) if labels else np.maximum(tokens[:, 1:], 0),
        loss_mask=np.stack([sample.loss_mask for sample in samples]),
        position_ids=np.stack([sample.position_ids for sample in samples]),
        document_ids=np.stack(documents) if documents else None,
        padding=np.stack([full if s.padding is None else s.padding for s in samples]) if padded else None,
    )


class MicroBatchLoader:
    """Gives the micro-batches of a step to one data-parallel rank. Close it, or use it as a context manager."""

    def __init__(
        self, source: SampleSource, *, dp_rank: int, dp_size: int, micro_batch_size: int, prefetch: int
    ) -> None:
        """``prefetch`` micro-batches are prepared ahead; 0 prepares each when it is asked for."""
        if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or prefetch < 0:
            raise ValueError(f"dp_rank {dp_rank}, dp_size {dp_size}, micro_batch_size {micro_batch_size}: out of range")
        self._source = source
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._micro_batch_size = micro_batch_size
        self._prefetch = prefetch
        self._worker: _Worker | None = None
        self.wait_seconds = 0.0
        """Time spent waiting for data since the start: divide its growth by step time for the data-wait share."""

    def micro_batches(self, consumed_samples: int, global_batch_size: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the step that starts after ``consumed_samples`` samples.

        Steps may follow each other or jump (resume, rewind); following on is what the prefetching expects.
        """
        per_round = self._micro_batch_size * self._dp_size
        if global_batch_size % per_round:
            raise ValueError(f"global batch {global_batch_size} is not divisible by micro-batch x dp = {per_round}")
        for start in range(consumed_samples, consumed_samples + global_batch_size, per_round):
            began = time.perf_counter()
            batch = self._get(start + self._dp_rank * self._micro_batch_size)
            self.wait_seconds += time.perf_counter() - began
            yield batch

    def close(self) -> None:
        """Stop the background thread."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def __enter__(self) -> "MicroBatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self, first: int) -> MicroBatch:
        if not self._prefetch:
            return self._load(first)
        if self._worker is None or self._worker.next_first != first:
            self.close()
            self._worker = _Worker(self, first, self._micro_batch_size * self._dp_size, self._prefetch)
        return self._worker.get()

    def _load(self, first: int) -> MicroBatch:
        return collate([self._source[index] for index in range(first, first + self._micro_batch_size)])


class _Worker:
    """A thread that loads micro-batches at a constant stride into a bounded queue; an error arrives in its place."""

    def __init__(self, loader: MicroBatchLoader, first: int, stride: int, depth: int) -> None:
        self.next_first = first
        self._stride = stride
        self._load = loader._load
        self._queue: queue.Queue[MicroBatch | Exception] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), daemon=True, name="data-prefetch")
        self._thread.start()

    def get(self) -> MicroBatch:
        item = self._queue.get()
        if isinstance(item, Exception):
            self._stopping.set()
            self.next_first = -1  # a retry starts a new thread
            raise item
        self.next_first += self._stride
        return item

    def stop(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():  # the thread may sit in put(): make room until it has seen the flag
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _run(self, first: int) -> None:
        while not self._stopping.is_set():
            try:
                item: MicroBatch | Exception = self._load(first)
            except Exception as error:
                item = error
            self._queue.put(item)
            if isinstance(item, Exception):
                return
            first += self._stride
