"""Results of several models side by side: tables for the terminal, a page with tables and plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nemo_llm.evaluation.classification import figures_as_rows
from nemo_llm.evaluation.suite import ModelResult
from nemo_llm.report.page import heading, page, paragraph, table
from nemo_llm.report.plot import columns, confusion, curves
from nemo_llm.report.text import aligned
from nemo_llm.storage.atomic_files import write_output

Table = tuple[str, list[str], list[list[str]]]
"""Title, names of the columns, rows."""


def tables(results: Sequence[ModelResult]) -> list[Table]:
    """Everything measured, a column for each model."""
    names = [result.name for result in results]
    found: list[Table] = []
    if any(result.perplexity for result in results):
        rows = []
        for place, first in enumerate(results[0].perplexity):
            parts = [result.perplexity[place] for result in results]
            rows.append([f"{first.name}: bits per byte", *(f"{part.bits_per_byte:.4f}" for part in parts)])
            rows.append([f"{first.name}: perplexity per token", *(f"{part.perplexity:.3f}" for part in parts)])
            rows.append([f"{first.name}: tokens", *(f"{part.num_tokens:,}" for part in parts)])
        found.append(("Perplexity", ["text", *names], rows))
    if any(result.tasks for result in results):
        rows = []
        for task, figures in results[0].tasks.items():
            for metric in figures:
                if not _is_error(metric):
                    cells = [_with_error(result.tasks[task], metric) for result in results]
                    rows.append([f"{task}: {metric}", *cells])
        found.append(("Tasks (± standard error)", ["task", *names], rows))
    for place, shown in enumerate(results[0].classification):
        columns = [dict(figures_as_rows(result.classification[place].figures)) for result in results]
        rows = [[row, *(column.get(row, "") for column in columns)] for row in columns[0]]
        found.append((f"Classification by {_means(shown.template)} (95% intervals)", ["figure", *names], rows))
        for result in results:
            told = result.classification[place].figures
            matrix = [[name, *map(str, row)] for name, row in zip(told.classes, told.confusion, strict=True)]
            title = f"Confusion of {result.name}, {_means(shown.template)} (rows: true classes, columns: predictions)"
            found.append((title, ["", *told.classes], matrix))
    for result in results:
        if result.comparisons:
            rows = [
                [
                    f"{part.first} - {part.second}",
                    f"{part.difference:+.3f}",
                    f"{part.p_value:.2g}",
                    "yes" if part.significant else "no",
                ]
                for part in result.comparisons
            ]
            title = f"Prompt templates of {result.name} (McNemar's exact test, Holm-adjusted)"
            found.append((title, ["templates", "accuracy", "p", "differ (5%)"], rows))
    return found


def _means(template: str | None) -> str:
    return "the trained head" if template is None else f"prompt template {template}"


def as_text(results: Sequence[ModelResult]) -> str:
    """The tables as aligned lines."""
    blocks = [(title, aligned([head, *rows], right=True)) for title, head, rows in tables(results)]
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in blocks)


def write_json(results: Sequence[ModelResult], path: Path) -> None:
    """All figures, each example's predictions among them."""
    write_output("output", path, json.dumps([asdict(r) for r in results], indent=1, ensure_ascii=False) + "\n")


def write_html(results: Sequence[ModelResult], path: Path) -> None:
    """One page without anything from elsewhere: tables, and a plot of every figure over steps or models."""
    parts = [paragraph(", ".join(f"{result.name}: {result.checkpoint}" for result in results))]
    for title, head, rows in tables(results):
        parts += [heading(title), table(head, rows)]
    plots = [_plot(name, values, results) for name, values in _series(results).items()]
    matrices = [
        confusion(f"{result.name}, {_means(part.template)}", list(part.figures.classes), part.figures.confusion)
        for result in results
        for part in result.classification
    ]
    write_output("report", path, page("Evaluation", [*parts, heading("Plots"), *plots, *matrices]))


def _series(results: Sequence[ModelResult]) -> dict[str, list[float]]:
    """Every headline figure over the models."""
    series: dict[str, list[float]] = {}
    for place, first in enumerate(results[0].perplexity):
        series[f"{first.name}: bits per byte"] = [result.perplexity[place].bits_per_byte for result in results]
    for task, figures in results[0].tasks.items():
        for metric in figures:
            if not _is_error(metric) and metric != "samples":
                series[f"{task}: {metric}"] = [float(result.tasks[task][metric]) for result in results]
    for place, part in enumerate(results[0].classification):
        values = [result.classification[place].figures.accuracy.value for result in results]
        series[f"{_means(part.template)}: accuracy"] = values
    return series


def _plot(title: str, values: Sequence[float], results: Sequence[ModelResult]) -> Markup:
    """A curve for each run of which several steps were measured, else a bar for each model."""
    runs = _runs(results)
    if runs is None:
        return columns(title, [result.name for result in results], {title: values})
    points = [(result.step or 0, value) for result, value in zip(results, values, strict=True)]
    return curves(title, [(run.name, [points[place] for place in places]) for run, places in runs.items()], "step")


def _runs(results: Sequence[ModelResult]) -> dict[Path, list[int]] | None:
    """Places of the results of each run, by the folder of its checkpoints; None where no run has several steps.

    Checkpoints of different runs are different models: no line may lead from one to the other.
    """
    runs: dict[Path, list[int]] = {}
    for place, result in enumerate(results):
        if result.step is None:
            return None
        folder = Path(result.checkpoint).absolute().parent
        runs.setdefault(folder.parent if folder.name == "checkpoints" else folder, []).append(place)
    return runs if any(len({results[place].step for place in places}) > 1 for places in runs.values()) else None


def _is_error(metric: str) -> bool:
    return "_stderr" in metric


def _with_error(figures: dict[str, Any], metric: str) -> str:
    value = figures[metric]
    if isinstance(value, int):
        return f"{value:,}"
    base, _, rest = metric.partition(",")
    error = figures.get(f"{base}_stderr{',' + rest if rest else ''}")
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
