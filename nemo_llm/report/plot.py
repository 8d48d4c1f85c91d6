"""Plots as SVG figures for a page; a value's number appears where the mouse rests on it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nemo_llm.report.text import share

COLOURS = ("#3366aa", "#cc7722", "#338855", "#aa3355", "#7755aa", "#777777")
_LEFT, _TOP, _BOTTOM = 56, 14, 26
"""Around columns and curves: room for the numbers of the axis, for the legend, and for what stands below."""
_ROW, _LABEL, _WIDE = 24, 330, 900
_CELL, _NAME, _HEAD, _SHOWN = 64, 120, 40, 14

Point = tuple[float, float]


def columns(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], size: tuple[int, int] = (340, 200)
) -> Markup:
    """Upright bars from zero: one for each group, or several beside each other with a legend.

    Args:
        series: values by name, one for each group; the groups of a single series have a colour each.
    """
    width, height = size
    ends = [0.0, *(value for values in series.values() for value in values)]
    low, high = min(ends), max(ends)
    axis = _Axis(low, high if high > low else low + 1.0, height)
    slot = (width - _LEFT - 8) / max(1, len(groups))
    thick = slot * 0.8 / len(series)
    marks = [axis.marks]
    for number, group in enumerate(groups):
        left = _LEFT + 4 + number * slot
        for shift, (name, values) in enumerate(series.items()):
            colour = COLOURS[(number if len(series) == 1 else shift) % len(COLOURS)]
            label = f"{group}: {_number(values[number])}" if len(series) == 1 else f"{name}: {_number(values[number])}"
            marks.append(_rect((left + shift * thick, thick), axis.span(values[number]), colour, label))
        marks.append(_text(left, height - 8, group[: max(4, int(slot / 7))]))
    return _figure(title, size, [*marks, _legend(series if len(series) > 1 else ())])


def curves(
    title: str, lines: Sequence[tuple[str, Sequence[Point]]], x_name: str, size: tuple[int, int] = (340, 200)
) -> Markup:
    """A curve for each name and its points; a legend where there are several."""
    width, height = size
    points = [point for _, line in lines for point in line]
    (first, last), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    axis = _Axis(*((low, high) if high > low else (low - 0.5, high + 0.5)), height)
    marks = [axis.marks]
    for number, (_, line) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        across = [_LEFT + 6 + (x - first) / ((last - first) or 1) * (width - _LEFT - 16) for x, _ in sorted(line)]
        at = [(x, axis.height_of(y)) for x, (_, y) in zip(across, sorted(line), strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        marks.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>').format(path, colour))
        for (x, y), (step, value) in zip(at, sorted(line), strict=True):
            circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"><title>{}</title></circle>')
            marks.append(circle.format(x, y, colour, f"{x_name} {_number(step)}: {_number(value)}"))
    marks += [
        _text(width - 4, height - 8, f"{x_name} {last:g}", "end"),
        _text(_LEFT, height - 8, f"{x_name} {first:g}"),
    ]
    return _figure(title, size, [*marks, _legend([name for name, _ in lines] if len(lines) > 1 else ())])


def bars(rows: Sequence[tuple[str, int]], whole: int) -> Markup:
    """Level bars, each with its number and its share of the whole."""
    marks = []
    for number, (label, count) in enumerate(rows):
        top, long = number * _ROW, max(1.0, (_WIDE - _LABEL - 150) * count / max(1, whole))
        marks.append(_text(_LABEL - 8, top + 16, label[:50], "end"))
        marks.append(_rect((_LABEL, long), (top + 3, _ROW - 7), COLOURS[0]))
        marks.append(_text(_LABEL + long + 6, top + 16, f"{count:,} ({share(count, whole)})"))
    return _figure("", (_WIDE, len(rows) * _ROW), marks)


def confusion(title: str, names: Sequence[str], matrix: Sequence[Sequence[int]]) -> Markup:
    """A confusion matrix: rows are true classes, columns predictions.

    Each cell is darker the larger its share of the row, so that rare classes can be read too.
    """
    marks = [_text(_NAME, 14, "predicted"), _text(4, 34, "true")]
    for place, name in enumerate(names):
        middle = _CELL * place + _CELL // 2
        marks.append(_text(_NAME + middle, _HEAD - 6, name[:_SHOWN], "middle"))
        marks.append(_text(_NAME - 8, _HEAD + middle + 4, name[:_SHOWN], "end"))
    for row, counts in enumerate(matrix):
        total = sum(counts)
        for column, count in enumerate(counts):
            x, y, part = _NAME + _CELL * column, _HEAD + _CELL * row, count / max(total, 1)
            label = f"{names[row]} taken for {names[column]}: {count} ({share(count, total)})"
            marks.append(_rect((x, _CELL - 2), (y, _CELL - 2), COLOURS[0], label, 0.06 + 0.94 * part))
            ink = "#fff" if part > 0.5 else "#222"
            marks.append(_text(x + _CELL // 2, y + _CELL // 2 + 4, f"{count:,}", "middle", ink))
    return _figure(title, (_NAME + _CELL * len(names) + 8, _HEAD + _CELL * len(names) + 8), marks)


class _Axis:
    """Where values stand above each other between the legend and what stands below."""

    def __init__(self, low: float, high: float, height: int) -> None:
        self._low, self._high, self._floor = low, high, height - _BOTTOM
        ends = ((self._floor, low), (_TOP + 2, high))
        self.marks = Markup().join(_text(_LEFT - 4, at, _number(value), "end") for at, value in ends)

    def height_of(self, value: float) -> float:
        return self._floor - (value - self._low) / (self._high - self._low) * (self._floor - _TOP)

    def span(self, value: float) -> Point:
        """Top and height of a bar from zero to a value."""
        ends = sorted((self.height_of(value), self.height_of(0.0)))
        return ends[0], ends[1] - ends[0]


def _legend(names: Iterable[str]) -> Markup:
    parts = [
        Markup('<tspan fill="{}">{} </tspan>').format(COLOURS[number % len(COLOURS)], name)
        for number, name in enumerate(names)
    ]
    return Markup('<text x="{}" y="10">{}</text>').format(_LEFT, Markup().join(parts)) if parts else Markup()


def _figure(title: str, size: tuple[int, int], marks: Iterable[Markup]) -> Markup:
    picture = Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img">{2}</svg>')
    caption = Markup("<figcaption>{}</figcaption>").format(title) if title else Markup()
    return Markup("<figure>{}{}</figure>").format(picture.format(*size, Markup().join(marks)), caption)


def _rect(across: Point, down: Point, colour: str, label: str = "", opacity: float = 1.0) -> Markup:
    """(left, width), (top, height)."""
    place = Markup('x="{:.1f}" width="{:.1f}" y="{:.1f}" height="{:.1f}"').format(*across, *down)
    rect = Markup('<rect {} fill="{}" fill-opacity="{:.3f}"><title>{}</title></rect>')
    return rect.format(place, colour, opacity, label)


def _text(x: float, y: float, text: Any, anchor: str = "start", colour: str = "#222") -> Markup:
    return Markup('<text x="{:.1f}" y="{}" text-anchor="{}" fill="{}">{}</text>').format(x, y, anchor, colour, text)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
