"""Figures as text, for terminals and pages alike."""

from collections.abc import Sequence


def shown(value: object) -> str:
    """A cell of a table: whole numbers with separators, anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def share(count: int, whole: int) -> str:
    """Part of a whole, in percent."""
    return f"{100 * count / max(1, whole):.1f}%"


def duration(seconds: float) -> str:
    """A length of time in two units that fit it, such as ``2h 05m``; below a minute in seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Lines of a table; with ``right`` all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *(">" if right else "<" for _ in widths[1:])]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
