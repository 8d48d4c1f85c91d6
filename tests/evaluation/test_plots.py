"""The room that all reports are made in: what is text is never markup, and every value can be read."""

import re
from html.parser import HTMLParser
from itertools import pairwise

from nemo_llm.report.page import folded, heading, note, page, paragraph, table
from nemo_llm.report.plot import bars, columns, confusion, curves
from nemo_llm.report.text import aligned, duration

HOSTILE = '<b onclick="x">&amp;'


class Texts(HTMLParser):
    """Collects text and the names of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.names: list[str] = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)


def read(text: str) -> Texts:
    found = Texts()
    found.feed(text)
    return found


def test_text_of_others_is_shown_and_never_markup() -> None:
    parts = {
        "heading": heading(HOSTILE),
        "paragraph": paragraph(HOSTILE),
        "note": note(HOSTILE),
        "head": table([HOSTILE], []),
        "cell": table(["a"], [[HOSTILE]]),
        "summary": folded(HOSTILE, []),
        "source": folded("a", [(HOSTILE, "b")]),
        "example": folded("a", [("b", HOSTILE)]),
        "bar": bars([(HOSTILE, 1)], 1),
        "group": columns("a", [HOSTILE], {"b": [1.0]}, size=(900, 200)),
        "series": columns("a", ["b"], {HOSTILE: [1.0], "c": [2.0]}),
        "caption": columns(HOSTILE, ["b"], {"c": [1.0]}),
        "curve": curves("a", [(HOSTILE, [(0, 1.0)]), ("b", [(1, 2.0)])], "step"),
        "classes": confusion("a", [HOSTILE, "b"], [[1, 0], [0, 1]]),
    }
    for name, part in {**parts, "title": page(HOSTILE, [])}.items():
        found = read(str(part))
        shown = HOSTILE[:14] if name == "classes" else HOSTILE
        assert any(shown in text for text in found.texts), name
        assert "b" not in found.names, name


def test_bars_of_several_series_stand_beside_each_other_and_can_be_read() -> None:
    picture = str(columns("", ["64", "128"], {"before": [100, 50], "after": [25, 0]}, size=(900, 240)))
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([^"]*)"', picture)]
    assert heights == [heights[0], heights[0] / 4, heights[0] / 2, 0.0]
    left = [float(x) for x in re.findall(r'<rect x="([^"]*)" width', picture)]
    wide = float(re.findall(r'width="([^"]*)" y=', picture)[0])
    assert left == sorted(left)
    assert all(second - first >= wide - 0.2 for first, second in pairwise(left))
    assert re.findall(r"<title>([^<]*)</title>", picture) == ["before: 100", "after: 25", "before: 50", "after: 0"]
    assert ">before <" in picture


def test_bars_of_values_below_zero_hang_from_zero() -> None:
    picture = str(columns("", ["a", "b"], {"c": [-1.0, 1.0]}))
    (top, height), (other_top, other_height) = (
        (float(y), float(high)) for y, high in re.findall(r' y="([^"]*)" height="([^"]*)"', picture)
    )
    assert height == other_height
    assert abs(other_top + other_height - top) < 0.11


def test_a_curve_of_one_point_is_drawn() -> None:
    picture = str(curves("", [("a", [(5, 2.0)])], "step"))
    assert picture.count("<circle") == 1
    assert "nan" not in picture
    assert "step 5: 2" in picture


def test_tables_for_terminals() -> None:
    assert aligned([["a", "bb"], ["ccc", "d"]], right=True) == ["a    bb", "ccc   d"]
    assert aligned([["a", "bb"], ["ccc", "d"]]) == ["a    bb", "ccc  d"]
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 90_000)] == ["0s", "1m 00s", "59m 59s", "1d 01h"]
