"""A range of a flattened tensor as boxes of the tensor. No torch.

The distributed optimizer cuts each parameter's state at places that depend on the number of data-parallel ranks. A
checkpoint stores boxes (an offset and a size in each dimension), which any other layout can read. Every range is a few
boxes: the end of one row, whole rows, the beginning of another, and the same again inside those rows.
"""

from collections.abc import Iterator
from math import prod


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of boxes that make up elements ``[start, stop)`` of a row-major ``shape``, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (((start,), (stop - start,)) if shape else ((), ()))
        return
    inner = prod(shape[1:])
    first_whole, end_whole = -(-start // inner), stop // inner
    if first_whole > end_whole:  # inside one row
        yield from _in_row(shape, start // inner, start % inner, stop - (start // inner) * inner)
        return
    if start % inner:
        yield from _in_row(shape, first_whole - 1, start % inner, inner)
    if first_whole < end_whole:
        rest = shape[1:]
        yield (first_whole, *(0 for _ in rest)), (end_whole - first_whole, *rest)
    if stop % inner:
        yield from _in_row(shape, end_whole, 0, stop % inner)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes_of_range(shape[1:], start, stop):
        yield (row, *offset), (1, *size)
