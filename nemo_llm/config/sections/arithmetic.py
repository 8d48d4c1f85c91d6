"""Small arithmetic that checks and their messages share: divisors, multiples, padded vocabulary."""

from collections.abc import Iterable


def divisors(number: int, at_most: int | None = None) -> list[int]:
    """Divisors of `number` in ascending order."""
    limit = number if at_most is None else min(number, at_most)
    return [candidate for candidate in range(1, limit + 1) if number % candidate == 0]


def common_divisors(numbers: Iterable[int]) -> list[int]:
    """Numbers that divide every one of `numbers`."""
    first, *rest = list(numbers)
    return [candidate for candidate in divisors(first) if all(number % candidate == 0 for number in rest)]


def neighbouring_multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `number`, below (if above zero) and above."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def either(numbers: Iterable[int]) -> str:
    """``1, 2 or 4``."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to a multiple of `divisible_by`.

    Megatron-LM rounds to a multiple of `divisible_by` x TP, which makes the shape of the weights depend on the layout.
    Here TP must divide the padded size instead, and every layout has the same weights.
    """
    return -(-vocab_size // divisible_by) * divisible_by


def evenly_spread(count: int, length: int) -> list[int]:
    """`count` places among `length`, the first at 0."""
    return [turn * length // count for turn in range(count)]


def is_mixture(layer: int, first_dense: int | None, frequency: int) -> bool:
    """Whether a layer, from 0, of a model with experts has them: every `frequency`-th behind the first dense ones."""
    return layer >= (first_dense or 0) and layer % frequency == 0
