"""A confusion matrix as a picture (SVG): rows are true classes, columns predictions, darker the larger their share."""

import html
from collections.abc import Sequence

_CELL, _LABEL, _TOP = 64, 120, 40
_SHOWN = 14


def confusion_picture(title: str, names: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """An HTML figure; each cell is coloured by its share of the row, so that rare classes can be read too."""
    width, height = _LABEL + _CELL * len(names) + 8, _TOP + _CELL * len(names) + 8
    marks = [
        f'<text x="{_LABEL}" y="14" font-size="12">predicted</text>',
        '<text x="4" y="34" font-size="12">true</text>',
    ]
    for place, name in enumerate(names):
        short = html.escape(name[:_SHOWN])
        middle = _LABEL + _CELL * place + _CELL // 2
        marks.append(f'<text x="{middle}" y="{_TOP - 6}" font-size="12" text-anchor="middle">{short}</text>')
        line = _TOP + _CELL * place + _CELL // 2 + 4
        marks.append(f'<text x="{_LABEL - 8}" y="{line}" font-size="12" text-anchor="end">{short}</text>')
    for row, counts in enumerate(matrix):
        total = max(sum(counts), 1)
        for column, count in enumerate(counts):
            share = count / total
            x, y = _LABEL + _CELL * column, _TOP + _CELL * row
            told = html.escape(f"{names[row]} taken for {names[column]}: {count} ({share:.1%})")
            ink = "#fff" if share > 0.5 else "#222"
            marks.append(
                f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" fill="#3366aa" '
                f'fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{told}</title></rect>'
                f'<text x="{x + _CELL // 2}" y="{y + _CELL // 2 + 4}" font-size="13" text-anchor="middle" '
                f'fill="{ink}">{count:,}</text>'
            )
    return (
        f'<figure><svg width="{width}" height="{height}" role="img">{"".join(marks)}</svg>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )
