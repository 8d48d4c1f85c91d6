"""Figures against scikit-learn's and scipy's; intervals that hold what they say."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from nemo_llm.evaluation.metrics import (
    bootstrap_interval,
    classification_figures,
    holm_adjusted,
    mcnemar_p_value,
    wilson_interval,
)

NAMES = ["a", "b", "c", "never"]


@pytest.fixture(scope="module")
def guesses() -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(3)
    gold = generator.choice(3, 300, p=[0.6, 0.3, 0.1])
    predicted = np.where(generator.random(300) < 0.7, gold, generator.choice(3, 300))
    return [NAMES[i] for i in gold], [NAMES[i] for i in predicted]


def test_figures_equal_scikit_learn(guesses: tuple) -> None:
    gold, predicted = guesses
    figures = classification_figures(gold, predicted, NAMES)
    rows = precision_recall_fscore_support(gold, predicted, labels=NAMES, zero_division=0)
    for number, name in enumerate(NAMES):
        part = figures.classes[name]
        assert [part.precision, part.recall, part.f1, part.support] == pytest.approx([row[number] for row in rows])
    for average in ("macro", "micro"):
        expected = precision_recall_fscore_support(gold, predicted, labels=NAMES, average=average, zero_division=0)[:3]
        if average == "macro":
            ours = [figures.macro_precision.value, figures.macro_recall.value, figures.macro_f1.value]
        else:
            ours = [figures.micro_precision, figures.micro_recall, figures.micro_f1]
        assert ours == pytest.approx(expected)
    assert figures.confusion == confusion_matrix(gold, predicted, labels=NAMES).tolist()


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (10, 10), (412, 1000)])
def test_wilson_equals_scipy(right: int, total: int) -> None:
    expected = binomtest(right, total).proportion_ci(method="wilson")
    assert wilson_interval(right, total) == pytest.approx((expected.low, expected.high))


def test_mcnemar_equals_the_exact_binomial_test() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.random(200) < 0.7, generator.random(200) < 0.6
    one, two = int((first & ~second).sum()), int((second & ~first).sum())
    expected = binomtest(min(one, two), one + two).pvalue
    assert mcnemar_p_value(first.tolist(), second.tolist()) == pytest.approx(expected)
    assert mcnemar_p_value([True, False], [True, False]) == 1.0


def test_holm_adjusts_in_order() -> None:
    assert holm_adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_bootstrap_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        interval = bootstrap_interval(generator.exponential(2.0, 80).tolist())
        held += interval.low <= 2.0 <= interval.high
    assert 176 <= held <= 198
