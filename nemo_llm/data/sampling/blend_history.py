"""Whether a changed blend leaves what a run has already read as it was."""

from collections.abc import Iterator
from fractions import Fraction

from nemo_llm.config.sections.data import DataConfig
from nemo_llm.errors import Problem


def check_blend_history(saved: DataConfig, new: DataConfig, consumed_samples: int) -> Iterator[Problem]:
    """Yield what keeps ``new`` from going on where a run with ``saved`` stands after ``consumed_samples`` samples.

    Sources may be added (with weight 0 in ``data.blend``) and weights may change in ``data.blend_changes`` from
    ``consumed_samples`` on; then every sample up to there is the same as before, and each source goes on from where it
    stands. Other keys of the section are not looked at.
    """
    before, after = (list(_phases(config, consumed_samples)) for config in (saved, new))
    if before != after:
        first = next((a or b for a, b in _side_by_side(before, after) if a != b), (0, ()))
        yield Problem(
            "data.blend_changes",
            [
                [start, {name: None if share is None else float(share) for name, share in shares}]
                for start, shares in after
            ],
            f"changes the order of samples from number {first[0]} on, but the run has read {consumed_samples} of them",
            f"leave data.blend and earlier changes as they were, and add a change with from_sample: {consumed_samples} "
            "or later; a new source stands in data.blend with weight 0",
        )
    read, known = ({entry.name: entry.identity for entry in config.blend} for config in (saved, new))
    for name in sorted({name for _, shares in before for name, _ in shares}):
        if known.get(name) != read[name]:
            yield Problem(
                f"data.blend ({name})",
                known.get(name),
                f"the run has read this source from {read[name]}",
                "keep it under this name (give it no weight from here on), and add the other one under a new name",
            )


def _phases(config: DataConfig, stop: int) -> Iterator[tuple[int, tuple[tuple[str, Fraction | None], ...]]]:
    """Yield (first sample, the sources in use with their exact shares) of each phase that begins before ``stop``.

    The share is None where weights come from sizes. The order of the sources counts: it shapes the blend.
    """
    entries = config.blend
    names = [entry.name for entry in entries]
    if entries[0].weight is None:
        yield 0, tuple((name, None) for name in names)
    else:
        yield 0, _shares({entry.name: entry.weight or 0.0 for entry in entries}, names)
    for change in config.blend_changes:
        if change.from_sample < stop:
            yield change.from_sample, _shares(change.weights, names)


def _shares(weights: dict[str, float], names: list[str]) -> tuple[tuple[str, Fraction | None], ...]:
    used = [(name, Fraction(weights[name])) for name in names if weights.get(name, 0.0) > 0]
    total = sum((weight for _, weight in used), Fraction(0))
    return tuple((name, weight / total) for name, weight in used)


def _side_by_side(before: list, after: list) -> Iterator[tuple]:
    for number in range(max(len(before), len(after))):
        yield tuple(side[number] if number < len(side) else None for side in (before, after))
