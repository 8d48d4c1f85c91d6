"""AdamW of many tensors in one launch, which writes the 16-bit weights of the model as well.

An update reads the weight in fp32, its gradient and both moments once, and writes all but the gradient: 28 bytes a
weight, and 2 for its 16-bit copy. The arithmetic is that of PyTorch's fused AdamW on CUDA (2.11 to 2.13), operation by
operation, so that the results are the same bits.

Checked in Triton's interpreter (tests/models/test_kernels.py) and against PyTorch on a GPU
(``python -m tests.models.kernel_checks cuda adamw``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_CHUNK = 1 << 13  # elements that one program updates
_VECTOR = 4  # elements that a thread reads at once where every tensor allows it


@dataclass(frozen=True)
class AdamWRule:
    """What an update does: settings of AdamW, and ``divisor``, by which gradients are divided as they are read."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    divisor: float = 1.0

    def numbers(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """``[7]`` and ``[2]`` float32 on the device: these settings, and what is missing from the moments.

        The host does not wait for them. Powers are the device's, whose last bit is another than the host's.
        """
        settings = [self.divisor, self.lr, self.weight_decay, self.eps, *self.betas, float(self.step)]
        numbers = torch.tensor(settings, dtype=torch.float32, pin_memory=device.type == "cuda")
        numbers = numbers.to(device, non_blocking=True)
        return numbers, 1.0 - numbers[4:6] ** numbers[6]


class AdamWPass:
    """One launch for these tensors, which stay where they are from now on.

    Args:
        lists: fp32 weights, fp32 gradients, first moments, second moments; then, or not, the 16-bit copies of the
            weights. Each list has as many tensors of the same sizes, contiguous, none empty.
    """

    def __init__(self, lists: Sequence[Sequence[torch.Tensor]]) -> None:
        assert all(t.is_contiguous() for tensors in lists for t in tensors)
        assert all(t.dtype == torch.float32 for tensors in lists[:4] for t in tensors)
        self._tensors = lists  # their memory is not given to others
        self._firsts = [tensors[0] for tensors in lists]
        self._aligned = all(t.numel() % _VECTOR == 0 and _distance(t, s[0]) % _VECTOR == 0 for s in lists for t in s)
        pieces = []
        for same in zip(*lists, strict=True):
            begin = torch.arange(0, same[0].numel(), _CHUNK, dtype=torch.int64)
            offsets = [begin + _distance(tensor, first) for tensor, first in zip(same, self._firsts, strict=True)]
            pieces.append(torch.stack([(same[0].numel() - begin).clamp(max=_CHUNK), *offsets]))
        # [1 + lists, chunks]: how many elements a chunk has, and where it begins behind each list's first tensor.
        self._chunks = torch.cat(pieces, 1).to(self._firsts[0].device)

    def run(self, rule: AdamWRule) -> None:
        """Update the tensors; the gradients are only read."""
        count = self._chunks.shape[1]
        _adamw[(count,)](
            *self._firsts[:4],
            self._firsts[-1],
            self._chunks,
            *rule.numbers(self._chunks.device),
            count,
            HALF=len(self._firsts) == 5,
            VECTOR=_VECTOR if self._aligned else 1,
            **_BLOCK,
        )


def _distance(tensor: torch.Tensor, first: torch.Tensor) -> int:
    return (tensor.data_ptr() - first.data_ptr()) // first.element_size()


_BLOCK = {"BLOCK": 1024, "num_warps": 8}


@triton.jit(do_not_specialize=["count"])
def _adamw(
    weight,
    gradient,
    first,
    second,
    half,
    chunks,
    numbers,
    corrections,
    count,
    HALF: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Operations and their order as in PyTorch's adam_math: quotients and roots are rounded to nearest.
    place = chunks + tl.program_id(0)
    size = tl.multiple_of(tl.load(place), VECTOR)
    weight += tl.multiple_of(tl.load(place + count), VECTOR)
    gradient += tl.multiple_of(tl.load(place + 2 * count), VECTOR)
    first += tl.multiple_of(tl.load(place + 3 * count), VECTOR)
    second += tl.multiple_of(tl.load(place + 4 * count), VECTOR)
    if HALF:
        half += tl.multiple_of(tl.load(place + 5 * count), VECTOR)
    divisor, lr, eps = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 3)
    decay = lr * tl.load(numbers + 2)
    keep_first, keep_second = tl.load(numbers + 4), tl.load(numbers + 5)
    step_size = tl.div_rn(lr, tl.load(corrections))
    correction = tl.sqrt_rn(tl.load(corrections + 1))
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        w = tl.load(weight + at, inside, 0.0)
        g = tl.load(gradient + at, inside, 0.0)
        m = tl.load(first + at, inside, 0.0)
        v = tl.load(second + at, inside, 0.0)
        g = tl.div_rn(g, divisor + tl.zeros_like(g))
        w = tl.fma(-decay, w, w)
        m = tl.fma(keep_first, m, tl.fma(-keep_first, g, g))
        v = tl.fma(keep_second, v, tl.fma(-keep_second, g * g, g * g))
        w -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), correction + tl.zeros_like(v)) + eps)
        tl.store(weight + at, w, inside)
        tl.store(first + at, m, inside)
        tl.store(second + at, v, inside)
        if HALF:
            tl.store(half + at, w.to(half.dtype.element_ty), inside)
