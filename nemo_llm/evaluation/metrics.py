"""Classification figures with confidence intervals, and whether two sets of answers really differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_SEED = 20240229


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class; precision and F1 are 0 where the class was never predicted, recall where it does not occur."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class ClassificationFigures:
    """Figures of one set of predictions. Micro averages equal accuracy, since every example has one label."""

    num_examples: int
    accuracy: Interval
    macro_precision: Interval
    macro_recall: Interval
    macro_f1: Interval
    micro_precision: float
    micro_recall: float
    micro_f1: float
    classes: dict[str, ClassFigures]
    confusion: list[list[int]]
    """Rows are true classes, columns predictions, in the order of ``classes``."""


def classification_figures(
    gold: Sequence[str], predicted: Sequence[str], names: Sequence[str]
) -> ClassificationFigures:
    """Accuracy, precision, recall and F1 of predictions, each with an interval.

    The interval of the accuracy is Wilson's; those of the macro averages come from resampling the examples (percentile
    bootstrap, always the same draws).
    """
    order = {name: number for number, name in enumerate(names)}
    truth = np.array([order[name] for name in gold], dtype=np.int64)
    guess = np.array([order[name] for name in predicted], dtype=np.int64)
    matrix = _confusion(truth, guess, len(names))
    precision, recall, f1 = _per_class(matrix)
    correct = int(matrix.trace())
    total = len(truth)
    accuracy = correct / max(total, 1)
    macros = _bootstrap_macros(truth, guess, len(names))
    supports = matrix.sum(1)
    return ClassificationFigures(
        num_examples=total,
        accuracy=Interval(accuracy, *wilson_interval(correct, total)),
        macro_precision=_interval(precision.mean(), macros[:, 0]),
        macro_recall=_interval(recall.mean(), macros[:, 1]),
        macro_f1=_interval(f1.mean(), macros[:, 2]),
        micro_precision=accuracy,
        micro_recall=accuracy,
        micro_f1=accuracy,
        classes={
            name: ClassFigures(float(precision[i]), float(recall[i]), float(f1[i]), int(supports[i]))
            for i, name in enumerate(names)
        },
        confusion=matrix.tolist(),
    )


def wilson_interval(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927): sensible for few examples and near 0 and 1."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact McNemar test: the chance of so uneven a split of the examples that only one of the two got right."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    total = only_first + only_second
    if total == 0:
        return 1.0
    smaller = min(only_first, only_second)
    logs = [_log_binomial(total, k) - total * math.log(2) for k in range(smaller + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values of several comparisons made at once (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, p_values[number] * (len(p_values) - rank)))
        adjusted[number] = highest
    return adjusted


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Mean of per-example values with a percentile bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(_SEED).integers(0, len(array), (_RESAMPLES, len(array)))
    return _interval(array.mean(), array[draws].mean(1))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _confusion(truth: NDArray[np.int64], guess: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.bincount(truth * count + guess, minlength=count * count).reshape(count, count)


def _per_class(matrix: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    hits = matrix.diagonal().astype(np.float64)
    guessed, present = matrix.sum(0), matrix.sum(1)
    precision = hits / np.maximum(guessed, 1)
    recall = hits / np.maximum(present, 1)
    return precision, recall, 2 * hits / np.maximum(guessed + present, 1)


def _bootstrap_macros(truth: NDArray[np.int64], guess: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """[resamples, 3]: macro precision, recall and F1 of each resample."""
    generator = np.random.default_rng(_SEED)
    rows: list[list[float]] = []
    for _ in range(_RESAMPLES if len(truth) else 0):
        draw = generator.integers(0, len(truth), len(truth))
        rows.append([float(part.mean()) for part in _per_class(_confusion(truth[draw], guess[draw], count))])
    return np.array(rows or [[0.0, 0.0, 0.0]])


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
