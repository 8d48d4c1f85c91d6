"""Results of several models side by side: tables for the terminal, a page with tables and plots."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_llm.errors import InputError
from nemo_llm.evaluation.classification import as_plain, figures_as_rows
from nemo_llm.evaluation.confusion import confusion_picture
from nemo_llm.evaluation.suite import ModelResult

_COLOURS = ("#3366aa", "#cc7722", "#338855", "#aa3355", "#7755aa", "#777777")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 340, 200, 56, 26
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
    blocks = []
    for title, head, rows in tables(results):
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(pairs)
            )
            for pairs in (list(zip(row, widths, strict=True)) for row in [head, *rows])
        ]
        blocks.append("\n".join([title, *(f"  {line.rstrip()}" for line in lines)]))
    return "\n\n".join(blocks)


def write_json(results: Sequence[ModelResult], path: Path) -> None:
    """All figures, each example's predictions among them."""
    _write(path, json.dumps([as_plain(result) for result in results], indent=1, ensure_ascii=False) + "\n", "output")


def write_html(results: Sequence[ModelResult], path: Path) -> None:
    """One page without anything from elsewhere: tables, and a plot of every figure over steps or models."""
    parts = [f"<h2>{html.escape(title)}</h2>{_html_table(head, rows)}" for title, head, rows in tables(results)]
    plots = "".join(_plot(name, values, results) for name, values in _series(results).items())
    page = f"""<!doctype html><meta charset="utf-8"><title>Evaluation</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}}
table{{border-collapse:collapse;margin:.5em 0 1.5em}}td,th{{padding:.25em .8em;border-bottom:1px solid #ddd}}
td,th{{text-align:right}}
td:first-child,th:first-child{{text-align:left}}figure{{display:inline-block;margin:.5em 1em .5em 0}}
figcaption{{font-size:90%}}</style>
<h1>Evaluation</h1><p>{html.escape(", ".join(f"{r.name}: {r.checkpoint}" for r in results))}</p>
{"".join(parts)}<h2>Plots</h2>{plots}{_confusions(results)}
"""
    _write(path, page, "report")


def _confusions(results: Sequence[ModelResult]) -> str:
    return "".join(
        confusion_picture(f"{result.name}, {_means(part.template)}", list(part.figures.classes), part.figures.confusion)
        for result in results
        for part in result.classification
    )


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


def _plot(title: str, values: Sequence[float], results: Sequence[ModelResult]) -> str:
    """A line for each run of which several steps were measured, else a bar for each model; as SVG."""
    runs = _runs(results)
    marks = _bars(values, results) if runs is None else _lines(values, results, runs)
    legend = ""
    if runs is not None and len(runs) > 1:
        names = (f'<tspan fill="{colour}">{html.escape(run.name)} </tspan>' for run, colour in _coloured(runs))
        legend = f'<text x="{_LEFT}" y="10" font-size="11">{"".join(names)}</text>'
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(marks)}{legend}</svg>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


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


def _coloured(runs: dict[Path, list[int]]) -> list[tuple[Path, str]]:
    return [(run, _COLOURS[number % len(_COLOURS)]) for number, run in enumerate(runs)]


def _heights(values: Sequence[float], low: float, high: float) -> tuple[list[float], list[str]]:
    """Where values stand in the picture, and the two ends of the axis."""
    bottom = _HEIGHT - _BOTTOM
    y = [bottom - (value - low) / (high - low) * (bottom - 14) for value in values]
    ends = [
        f'<text x="{_LEFT - 4}" y="{at}" text-anchor="end" font-size="11">{value:.4g}</text>'
        for at, value in ((bottom, low), (16, high))
    ]
    return y, ends


def _lines(values: Sequence[float], results: Sequence[ModelResult], runs: dict[Path, list[int]]) -> list[str]:
    low, high = min(values), max(values)
    y, marks = _heights(values, *((low, high) if high > low else (low - 0.5, high + 0.5)))
    steps = [result.step or 0 for result in results]
    first, last = min(steps), max(steps)
    x = [_LEFT + 6 + (step - first) / max(last - first, 1) * (_WIDTH - _LEFT - 16) for step in steps]
    for run, colour in _coloured(runs):
        points = sorted((x[place], y[place]) for place in runs[run])
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
    marks.append(f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 8}" text-anchor="end" font-size="11">step {last}</text>')
    marks.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}" font-size="11">step {first}</text>')
    return marks


def _bars(values: Sequence[float], results: Sequence[ModelResult]) -> list[str]:
    low, high = min(*values, 0.0), max(*values, 0.0)
    y, marks = _heights(values, low, high if high > low else low + 1.0)
    zero = _heights([0.0], low, high if high > low else low + 1.0)[0][0]
    slot = (_WIDTH - _LEFT - 8) / len(values)
    for number, (result, at) in enumerate(zip(results, y, strict=True)):
        x = _LEFT + 4 + number * slot
        marks.append(
            f'<rect x="{x:.1f}" y="{min(at, zero):.1f}" width="{slot * 0.8:.1f}" height="{abs(zero - at):.1f}" '
            f'fill="{_COLOURS[number % len(_COLOURS)]}">'
            f"<title>{html.escape(result.name)}: {values[number]:.5g}</title></rect>"
        )
        label = html.escape(result.name[: max(4, int(slot / 7))])
        marks.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" font-size="11">{label}</text>')
    return marks


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _is_error(metric: str) -> bool:
    return "_stderr" in metric


def _with_error(figures: dict[str, Any], metric: str) -> str:
    value = figures[metric]
    if isinstance(value, int):
        return f"{value:,}"
    base, _, rest = metric.partition(",")
    error = figures.get(f"{base}_stderr{',' + rest if rest else ''}")
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _write(path: Path, text: str, key: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{key}={path}: cannot be written ({error.strerror or error})") from None
