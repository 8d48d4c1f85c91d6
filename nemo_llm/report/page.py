"""One HTML file that needs nothing from elsewhere: headings, tables, notes and plots. What is text is escaped."""

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from nemo_llm.report.text import shown

_PAGE = Markup("""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }} tr {{ border-bottom: 1px solid #e5e5e5; }}
th, td {{ padding: .2rem 1.2rem .2rem 0; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
.note {{ background: #fff4d6; padding: .5rem .8rem; }} details {{ margin: .3rem 0; }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: .5rem; font-size: 12px; margin: .3rem 0; }}
figure {{ display: inline-block; max-width: 100%; margin: .5rem 1rem .5rem 0; }} figcaption {{ font-size: 90%; }}
svg {{ max-width: 100%; height: auto; }} svg text {{ font: 12px system-ui, sans-serif; }}
</style><h1>{title}</h1>
{body}</html>
""")


def page(title: str, parts: Iterable[Markup]) -> str:
    """The file of a page with this title and these parts, which the functions below and `nemo_llm.report.plot` make."""
    return str(_PAGE.format(title=title, body=Markup("\n").join(parts)))


def heading(text: str) -> Markup:
    """The title of a section."""
    return Markup("<h2>{}</h2>").format(text)


def paragraph(text: str) -> Markup:
    """Plain text."""
    return Markup("<p>{}</p>").format(text)


def note(text: str) -> Markup:
    """What the reader must not miss."""
    return Markup('<p class="note">{}</p>').format(text)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table: names on the left of each row, the rest to the right; whole numbers with separators."""
    lines = [Markup().join(Markup("<th>{}</th>").format(name) for name in head)]
    lines += [Markup().join(Markup("<td>{}</td>").format(shown(cell)) for cell in row) for row in rows]
    return Markup("<table>{}</table>").format(Markup().join(Markup("<tr>{}</tr>").format(line) for line in lines))


def folded(summary: str, examples: Iterable[tuple[str, str]]) -> Markup:
    """Examples (where each is from, its text) that open at a click."""
    inside = Markup().join(Markup("<p>{}</p><pre>{}</pre>").format(*example) for example in examples)
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, inside)
