"""AdamW of many tensors in one launch, which writes the 16-bit weights of the model as well.

An update reads the weight in fp32, its gradient and both moments once, and writes all but the gradient: 28 bytes a
weight, and 2 for its 16-bit copy. The arithmetic is that of PyTorch's fused AdamW on CUDA, operation by operation,
double precision where that has it, so that the results are the same bits.

Checked in Triton's interpreter (tests/models/test_kernels.py) and against PyTorch on a GPU
(``python -m tests.models.kernel_checks cuda adamw``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_CHUNK = 1 << 15  # elements that one program updates
_VECTOR = 4  # elements that a thread reads at once where every tensor allows it


@dataclass(frozen=True)
class Rule:
    """What an update does: settings of AdamW, and ``divisor``, by which gradients are divided as they are read."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    divisor: float = 1.0

    def numbers(self, device: torch.device) -> torch.Tensor:
        """``[9]`` float64 on the device, as the kernel reads them. The host does not wait for the copy."""
        first, second = self.betas
        rounded = torch.tensor([1.0 - first**self.step, (1.0 - second**self.step) ** 0.5], dtype=torch.float32).tolist()
        numbers = [self.divisor, self.lr * self.weight_decay, first, 1.0 - first, second, 1.0 - second]
        numbers += [self.lr / rounded[0], rounded[1], self.eps]
        pinned = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
        return pinned.to(device, non_blocking=True)


class AdamWPass:
    """One launch for these tensors, which stay where they are from now on.

    Args:
        lists: fp32 weights, fp32 gradients, first moments, second moments; then, or not, the 16-bit copies of the
            weights. Each list has as many tensors of the same sizes, contiguous, none empty.
    """

    def __init__(self, lists: Sequence[Sequence[torch.Tensor]]) -> None:
        self._firsts = [tensors[0] for tensors in lists]
        self._aligned = all(t.numel() % _VECTOR == 0 and _distance(t, s[0]) % _VECTOR == 0 for s in lists for t in s)
        pieces = []
        for same in zip(*lists, strict=True):
            begin = torch.arange(0, same[0].numel(), _CHUNK, dtype=torch.int64)
            offsets = [begin + _distance(tensor, first) for tensor, first in zip(same, self._firsts, strict=True)]
            pieces.append(torch.stack([(same[0].numel() - begin).clamp(max=_CHUNK), *offsets]))
        # [1 + lists, chunks]: how many elements a chunk has, and where it begins behind each list's first tensor.
        self._chunks = torch.cat(pieces, 1).to(self._firsts[0].device)

    def run(self, rule: Rule) -> None:
        """Update the tensors; the gradients are only read."""
        count = self._chunks.shape[1]
        _adamw[(count,)](
            *self._firsts[:4],
            self._firsts[-1],
            self._chunks,
            rule.numbers(self._chunks.device),
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
    count,
    HALF: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Operations as in PyTorch's adam_math: products and sums in double, roots and quotients in float.
    place = chunks + tl.program_id(0)
    size = tl.multiple_of(tl.load(place), VECTOR)
    weight += tl.multiple_of(tl.load(place + count), VECTOR)
    gradient += tl.multiple_of(tl.load(place + 2 * count), VECTOR)
    first += tl.multiple_of(tl.load(place + 3 * count), VECTOR)
    second += tl.multiple_of(tl.load(place + 4 * count), VECTOR)
    if HALF:
        half += tl.multiple_of(tl.load(place + 5 * count), VECTOR)
    divisor = tl.load(numbers).to(tl.float32)
    decay = tl.load(numbers + 1)
    keep_first, take_first = tl.load(numbers + 2), tl.load(numbers + 3)
    keep_second, take_second = tl.load(numbers + 4), tl.load(numbers + 5)
    step_size, root_correction = tl.load(numbers + 6).to(tl.float32), tl.load(numbers + 7).to(tl.float32)
    eps = tl.load(numbers + 8)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        w = tl.load(weight + at, inside, 0.0).to(tl.float64)
        g = tl.load(gradient + at, inside, 0.0)
        m = tl.load(first + at, inside, 0.0).to(tl.float64)
        v = tl.load(second + at, inside, 0.0).to(tl.float64)
        g = tl.div_rn(g, divisor + tl.zeros_like(g)).to(tl.float64)
        w = (w - decay * w).to(tl.float32)
        m = (keep_first * m + take_first * g).to(tl.float32)
        v = (keep_second * v + take_second * g * g).to(tl.float32)
        root = tl.div_rn(tl.sqrt_rn(v), root_correction + tl.zeros_like(v))
        w -= tl.div_rn(step_size * m, (root.to(tl.float64) + eps).to(tl.float32))
        tl.store(weight + at, w, inside)
        tl.store(first + at, m, inside)
        tl.store(second + at, v, inside)
        if HALF:
            tl.store(half + at, w.to(half.dtype.element_ty), inside)
