"""One HTML file that needs nothing from elsewhere: headings, tables, notes and plots. What is text is escaped."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nemo_llm.report.text import shown

_PAGE = Markup(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


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
