"""Keyed permutations of ``range(n)`` that need no table: the order of samples as a pure function.

A shuffled index array for 15 trillion tokens at sequence length 4096 would hold 3.7e9 entries (30 GB). A Feistel
network keyed by (seed, source, epoch) gives the same thing in constant memory: it is a bijection on ``[0, 2^b)``, and
cycle-walking (apply it again until the value falls into ``[0, n)``) makes it one on ``[0, n)``
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

import hashlib

_MASK64 = (1 << 64) - 1
_ROUNDS = (
    6  # four already make a pseudo-random permutation (Luby and Rackoff); two more cost 2 us and cover small halves
)
_TABLE_LIMIT = 1024  # below this a Feistel network has too few distinct permutations; an explicit table is tiny


def derive_key(*parts: object) -> int:
    """Return a 64-bit key that depends on every part, the same on every platform and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(value: int) -> int:
    """Return the SplitMix64 finaliser of ``value`` (Steele, Lea and Flood 2014): every input bit reaches every output
    bit.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class KeyedPermutation:
    """A bijection of ``range(size)`` chosen by ``key``; constant memory, about 10 us an element.

    ``permutation(i)`` maps one index.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, received size {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._left_bits = bits // 2
        self._right_bits = bits - self._left_bits
        self._round_keys = [mix64(key ^ mix64(number)) for number in range(_ROUNDS)]
        self._table = self._shuffled_table(key) if size <= _TABLE_LIMIT else None

    def __call__(self, index: int) -> int:
        """Return the image of ``index``; raises IndexError outside ``[0, size)``."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        if self._table is not None:
            return self._table[index]
        value = self._feistel(index)
        while value >= self.size:  # cycle-walking: fewer than two rounds are expected, since size > 2^(bits - 1)
            value = self._feistel(value)
        return value

    def _feistel(self, value: int) -> int:
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = value >> right_bits, value & ((1 << right_bits) - 1)
        for round_key in self._round_keys:  # an even number of rounds brings the two widths back to their places
            left, right = right, left ^ (mix64(right ^ round_key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right

    def _shuffled_table(self, key: int) -> list[int]:
        # Fisher-Yates on our own generator: numpy does not promise that its shuffles stay the same between versions.
        table, state = list(range(self.size)), key
        for last in range(self.size - 1, 0, -1):
            state = mix64(state + last)
            other = state % (last + 1)
            table[last], table[other] = table[other], table[last]
        return table
