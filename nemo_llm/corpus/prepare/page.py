"""The report as a page: one HTML file with its plots inside."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr { border-bottom: 1px solid #e5e5e5; }
.note { background: #fff4d6; padding: .5rem .8rem; } details { margin: .3rem 0; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .5rem; font-size: 12px; margin: .3rem 0; }
svg text { font: 12px system-ui, sans-serif; fill: #222; }
"""
_ROW, _LABEL, _WIDTH = 24, 330, 900


def report_page(report: Mapping[str, Any]) -> str:
    """Return the page."""
    given, kept = report["input"], report["output"]
    files = f"{given['files']:,} file{'s' * (given['files'] != 1)}"
    steps = report["steps"]
    dropped = [(f"{step['step']}: {why}", n) for step in steps for why, n in step["dropped"].items()]
    dropped.sort(key=lambda entry: -entry[1])
    parts = [
        "<h1>Prepared documents</h1>",
        f"<p>{given['documents']:,} documents in {files} ({_size(given['bytes'])}) went in, "
        f"{kept['documents']:,} ({_share(kept['documents'], given['documents'])}) came out, with "
        f"{_share(kept['characters'], given['characters'])} of the characters. {escape(report['made_by'])}.</p>",
        *(f'<p class="note">Not applied: {escape(text)}</p>' for text in report["not_applied"]),
        "<h2>Documents left after each step</h2>",
        _bars([(step["step"], step["out"]) for step in steps], steps[0]["in"]),
        "<h2>Reasons for drops</h2>",
        _bars(dropped[:25], steps[0]["in"]) if dropped else "<p>Nothing was dropped.</p>",
        "<h2>Lengths in characters, before and after</h2>",
        _lengths(report["lengths"]["before"], report["lengths"]["after"]),
        "<h2>Steps</h2>",
        _table(
            ["step", "in", "out", "dropped", "seconds"],
            [[s["step"], s["in"], s["out"], s["in"] - s["out"], f"{s['seconds']:.1f}"] for s in steps],
        ),
        *_details(report),
        "<h2>Examples of what was dropped</h2>",
        *_examples(steps),
    ]
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared documents</title><style>{_STYLE}</style>'
    )
    return head + "\n".join(parts) + "</html>\n"


def _details(report: Mapping[str, Any]) -> list[str]:
    parts = []
    for step in report["steps"]:
        if "lines_removed" in step:
            parts += [f"<h2>Lines removed by {escape(step['step'])}</h2>"]
            parts += [_table(["reason", "lines"], sorted(step["lines_removed"].items()))]
    if report["masks"]:
        parts += ["<h2>Personal data masked</h2>", _table(["mask", "count"], list(report["masks"].items()))]
    if report["evaluation_sets"]:
        rows = [[name, *figures.values()] for name, figures in report["evaluation_sets"].items()]
        parts += [
            "<h2>Evaluation sets</h2>",
            _table(["set", "items", "too short to be found", "documents dropped for it"], rows),
        ]
    return parts


def _examples(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"<details><summary>{escape(step['step'])}: {escape(reason)}</summary>"
        + "".join(f"<p>{escape(e['source'])}</p><pre>{escape(e['text'])}</pre>" for e in examples)
        + "</details>"
        for step in steps
        for reason, examples in step["examples"].items()
    ]


def _bars(rows: Sequence[tuple[str, int]], whole: int) -> str:
    """Horizontal bars, each with its number and its share of the whole."""
    room = _WIDTH - _LABEL - 150
    lines = []
    for number, (label, count) in enumerate(rows):
        top = number * _ROW
        width = max(1.0, room * count / max(1, whole))
        lines.append(
            f'<text x="{_LABEL - 8}" y="{top + 16}" text-anchor="end">{escape(label[:50])}</text>'
            f'<rect x="{_LABEL}" y="{top + 3}" width="{width:.1f}" height="{_ROW - 7}" fill="#4878a8"/>'
            f'<text x="{_LABEL + width + 6:.1f}" y="{top + 16}">{count:,} ({_share(count, whole)})</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {len(rows) * _ROW}" width="100%">{"".join(lines)}</svg>'


def _lengths(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Two bars for each power of two."""
    found = [edge for edge in (*map(int, before), *map(int, after)) if edge]
    edges = [1 << bits for bits in range(min(found, default=1).bit_length() - 1, max(found, default=1).bit_length())]
    most = max([*before.values(), *after.values(), 1])
    slot, height = min(70, (_WIDTH - 20) / max(1, len(edges))), 180
    lines = []
    for number, edge in enumerate(edges):
        for shift, counts, colour in ((0.1, before, "#b8c4d0"), (0.5, after, "#4878a8")):
            tall = height * counts.get(str(edge), 0) / most
            lines.append(
                f'<rect x="{10 + slot * (number + shift):.1f}" y="{20 + height - tall:.1f}" width="{slot * 0.38:.1f}" '
                f'height="{tall:.1f}" fill="{colour}"><title>{counts.get(str(edge), 0):,}</title></rect>'
            )
        lines.append(
            f'<text x="{10 + slot * (number + 0.5):.1f}" y="{height + 36}" text-anchor="middle">{_short(edge)}</text>'
        )
    legend = "".join(
        f'<rect x="{left}" y="2" width="12" height="12" fill="{colour}"/><text x="{left + 17}" y="12">{word}</text>'
        for left, colour, word in ((_WIDTH - 150, "#b8c4d0", "before"), (_WIDTH - 75, "#4878a8", "after"))
    )
    return f'<svg viewBox="0 0 {_WIDTH} {height + 45}" width="100%">{"".join(lines)}{legend}</svg>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(tag: str, value: Any, column: int) -> str:
        text = f"{value:,}" if isinstance(value, int) else escape(str(value))
        return f"<{tag}{' class=n' if column else ''}>{text}</{tag}>"

    lines = ["".join(cell("th", name, column) for column, name in enumerate(head))]
    lines += ["".join(cell("td", value, column) for column, value in enumerate(row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f}%"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _short(edge: int) -> str:
    return f"{edge >> 20}M" if edge >= 1 << 20 else f"{edge >> 10}k" if edge >= 1 << 10 else str(edge)
