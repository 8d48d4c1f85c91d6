"""The report of prepared documents as a page."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from nemo_llm.report.page import folded, heading, note, page, paragraph, table
from nemo_llm.report.plot import bars, columns
from nemo_llm.report.text import share


def report_page(report: Mapping[str, Any]) -> str:
    """The page of a ``report.json``, with its plots inside."""
    return page("Prepared documents", _parts(report))


def _parts(report: Mapping[str, Any]) -> Iterator[Markup]:
    given, kept, steps = report["input"], report["output"], report["steps"]
    files = f"{given['files']:,} file{'s' * (given['files'] != 1)}"
    yield paragraph(
        f"{given['documents']:,} documents in {files} ({_size(given['bytes'])}) went in, {kept['documents']:,} "
        f"({share(kept['documents'], given['documents'])}) came out, with "
        f"{share(kept['characters'], given['characters'])} of the characters. {report['made_by']}."
    )
    for text in report["not_applied"]:
        yield note(f"Not applied: {text}")
    yield heading("Documents left after each step")
    yield bars([(step["step"], step["out"]) for step in steps], steps[0]["in"])
    yield heading("Reasons for drops")
    dropped = [(f"{step['step']}: {why}", n) for step in steps for why, n in step["dropped"].items()]
    dropped.sort(key=lambda entry: -entry[1])
    yield bars(dropped[:25], steps[0]["in"]) if dropped else paragraph("Nothing was dropped.")
    yield heading("Lengths in characters, before and after")
    yield _lengths(report["lengths"])
    yield heading("Steps")
    rows = [[s["step"], s["in"], s["out"], s["in"] - s["out"], f"{s['seconds']:.1f}"] for s in steps]
    yield table(["step", "in", "out", "dropped", "seconds"], rows)
    for step in steps:
        if "lines_removed" in step:
            yield heading(f"Lines removed by {step['step']}")
            yield table(["reason", "lines"], sorted(step["lines_removed"].items()))
    if report["masks"]:
        yield heading("Personal data masked")
        yield table(["mask", "count"], report["masks"].items())
    if report["evaluation_sets"]:
        yield heading("Evaluation sets")
        sets = [[name, *figures.values()] for name, figures in report["evaluation_sets"].items()]
        yield table(["set", "items", "too short to be found", "documents dropped for it"], sets)
    yield heading("Examples of what was dropped")
    for step in steps:
        for reason, examples in step["examples"].items():
            yield folded(f"{step['step']}: {reason}", [(each["source"], each["text"]) for each in examples])


def _lengths(lengths: Mapping[str, Mapping[str, int]]) -> Markup:
    """Two bars for each power of two."""
    found = [edge for counts in lengths.values() for edge in map(int, counts) if edge]
    edges = [1 << bits for bits in range(min(found, default=1).bit_length() - 1, max(found, default=1).bit_length())]
    series = {name: [counts.get(str(edge), 0) for edge in edges] for name, counts in lengths.items()}
    return columns("", [_short(edge) for edge in edges], series, size=(900, 240))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _short(edge: int) -> str:
    return f"{edge >> 20}M" if edge >= 1 << 20 else f"{edge >> 10}k" if edge >= 1 << 10 else str(edge)
