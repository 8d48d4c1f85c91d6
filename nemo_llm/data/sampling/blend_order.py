"""Which source gives which sample: blends by weight as a pure function of the sample's index.

The sources hang on a balanced binary tree. At each node, the samples that arrive there are numbered 0, 1, 2, ... and
shared between left and right in blocks of 64: block ``k`` holds ``floor((k + 1) 64 w) - floor(k 64 w)`` left samples
(``w`` is the left share), at places that a keyed hash chooses. So
- after any number of samples, each source has had its share to within a few samples;
- a source's local index is the number of its samples so far: 0, 1, 2, ... without gaps, so a position is one number;
- nothing is stored, and running longer cannot change what came before.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from nemo_llm.data.sampling.keyed_permutation import derive_key, mix64

_BLOCK = 64


@lru_cache(maxsize=4096)
def _left_mask(key: int, block: int, num_left: int) -> int:
    """Return a 64-bit mask with ``num_left`` bits set at places chosen by (key, block)."""
    places, state = list(range(_BLOCK)), mix64(key ^ mix64(block))
    mask = 0
    for position in range(num_left):  # the first steps of a Fisher-Yates shuffle
        state = mix64(state + position)
        other = position + state % (_BLOCK - position)
        places[position], places[other] = places[other], places[position]
        mask |= 1 << places[position]
    return mask


class _Node:
    """Shares its samples between two children; a child is a node or the number of a source."""

    def __init__(self, left: "_Node | int", right: "_Node | int", share: Fraction, key: int) -> None:
        self.left, self.right = left, right
        self._numerator, self._denominator = share.numerator, share.denominator
        self._key = key

    def _before_block(self, block: int) -> int:
        return block * _BLOCK * self._numerator // self._denominator

    def _mask(self, block: int) -> int:
        return _left_mask(self._key, block, self._before_block(block + 1) - self._before_block(block))

    def left_before(self, index: int) -> int:
        """Return how many of the first ``index`` samples here go left."""
        block, offset = divmod(index, _BLOCK)
        if not offset:
            return self._before_block(block)
        return self._before_block(block) + (self._mask(block) & ((1 << offset) - 1)).bit_count()

    def goes_left(self, index: int) -> bool:
        """Return whether sample ``index`` here goes left."""
        block, offset = divmod(index, _BLOCK)
        return bool(self._mask(block) >> offset & 1)


class Blend:
    """Maps a sample's index to (source, index within the source) by weights, in constant memory.

    ``weights`` are relative shares of samples; a source of weight 0 gives none. Weights are used exactly as the
    fractions that the floats are, so that every machine computes the same. ``names`` of the sources seed the choice
    together with ``seed``: one of weight 0 may come or go without changing anything.
    """

    def __init__(self, weights: Sequence[float], seed: int, names: Sequence[str]) -> None:
        if not weights or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights must be zero or positive and not all zero, received {list(weights)}")
        self.num_sources = len(weights)
        exact = [Fraction(weight) for weight in weights]
        self.shares = [float(weight / sum(exact)) for weight in exact]
        chosen = [source for source, weight in enumerate(exact) if weight > 0]
        self._seed, self._names = seed, list(names)
        self._root = self._build(chosen, exact)

    def _build(self, sources: list[int], weights: list[Fraction]) -> "_Node | int":
        if len(sources) == 1:
            return sources[0]
        half = len(sources) // 2
        left, right = sources[:half], sources[half:]
        left_weight = sum((weights[source] for source in left), Fraction(0))
        right_weight = sum((weights[source] for source in right), Fraction(0))
        key = derive_key("blend", self._seed, *(self._names[source] for source in sources))
        share = left_weight / (left_weight + right_weight)
        return _Node(self._build(left, weights), self._build(right, weights), share, key)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the source of sample ``index`` and its index among that source's samples."""
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        node = self._root
        while isinstance(node, _Node):
            before = node.left_before(index)
            if node.goes_left(index):
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first ``num_samples`` samples each source gives (they sum to it)."""
        counts = [0] * self.num_sources
        waiting: list[tuple[_Node | int, int]] = [(self._root, num_samples)]
        while waiting:
            node, count = waiting.pop()
            if isinstance(node, _Node):
                left = node.left_before(count)
                waiting += [(node.left, left), (node.right, count - left)]
            else:
                counts[node] = count
        return counts

    def most_samples(self, available: Sequence[int]) -> int:
        """Return the largest number of samples that takes at most ``available[i]`` of each source."""
        low, high = 0, sum(available) + 1  # counts only grow with the number of samples: bisect
        while high - low > 1:
            middle = (low + high) // 2
            fits = all(count <= limit for count, limit in zip(self.counts(middle), available, strict=True))
            low, high = (middle, high) if fits else (low, middle)
        return low
