"""Several sources mixed by weights, with changes of the weights at given samples."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_llm.data.sampling.blend_order import Blend
from nemo_llm.data.sampling.sample import Sample
from nemo_llm.data.sampling.token_windows import EndlessSource


@dataclass(frozen=True, slots=True)
class Phase:
    """From sample ``from_sample`` on, these weights (one for each source); the first phase starts at 0."""

    from_sample: int
    weights: tuple[float, ...]


class BlendedSource:
    """Samples of several sources; finite when ``num_samples`` is given.

    A change of weights takes each source on from where it stands: the phases before decide only how many samples it
    has given so far.
    """

    def __init__(
        self, sources: Sequence[EndlessSource], phases: Sequence[Phase], seed: int, num_samples: int | None = None
    ) -> None:
        self.sources = list(sources)
        self.phases = list(phases)
        self.seq_length = self.sources[0].seq_length
        self.num_samples = num_samples
        self._starts = [phase.from_sample for phase in phases]
        names = [source.name for source in sources]
        self._blends = [Blend(phase.weights, seed, names) for phase in phases]
        self._positions = [[0] * len(self.sources)]  # of each source, at the start of each phase
        for blend, start, stop in zip(self._blends, self._starts, self._starts[1:], strict=False):
            taken = blend.counts(stop - start)
            self._positions.append([a + b for a, b in zip(self._positions[-1], taken, strict=True)])

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("a training source has no length: it repeats its data for as long as it is asked")
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if index < 0 or (self.num_samples is not None and index >= self.num_samples):
            raise IndexError(f"sample {index} is beyond the {self.num_samples} samples of this set")
        source, local = self.locate(index)
        return self.sources[source].sample(local, index)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the source of sample ``index``, and its index among that source's samples."""
        phase = bisect.bisect_right(self._starts, index) - 1
        source, local = self._blends[phase].locate(index - self._starts[phase])
        return source, self._positions[phase][source] + local

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first ``num_samples`` samples each source gives (they sum to it)."""
        phase = bisect.bisect_right(self._starts, num_samples) - 1
        taken = self._blends[phase].counts(num_samples - self._starts[phase])
        return [a + b for a, b in zip(self._positions[phase], taken, strict=True)]

    def describe(self, num_samples: int | None = None) -> str:
        """Return a table of the sources: tokens, share, and what ``num_samples`` samples take of each in epochs."""
        count = (self.num_samples if num_samples is None else num_samples) or 0
        taken = self.counts(count)
        head = f"{'source':<24} {'documents':>11} {'tokens':>15} {'share':>8} {'samples':>12} {'epochs':>9}"
        lines = [head]
        for source, share, samples in zip(self.sources, self._blends[0].shares, taken, strict=True):
            lines.append(
                f"{source.name:<24.24} {source.num_documents:>11,} {source.num_tokens:>15,} {share:>8.4f} "
                f"{samples:>12,} {samples / source.samples_per_epoch:>9.3f}"
            )
        for phase, blend in list(zip(self.phases, self._blends, strict=True))[1:]:
            shares = zip(self.sources, blend.shares, strict=True)
            listed = ", ".join(f"{source.name} {share:.4f}" for source, share in shares)
            lines.append(f"from sample {phase.from_sample:,}: {listed}")
        return "\n".join(lines)
