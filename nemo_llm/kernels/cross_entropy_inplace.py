"""Cross-entropy of finished logits and its gradient in their place, one Triton kernel that reads the logits once.

A program takes one token's row twice: for the log-sum-exp, then for the gradient, when the row is still in the GPU's
second-level cache (256 KB for a vocabulary of 128k in bf16, one row a multiprocessor).
"""

import torch
import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: infinity less infinity would be no number


@triton.jit
def _losses_and_gradient(logits, labels, weights, losses, hits, columns, known, z_coeff, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    weight = tl.load(weights + row)
    has_label = (label >= 0) & (label < known)
    label = tl.where(has_label, label, -1)
    label_logit = tl.load(logits + label, has_label, 0.0).to(tl.float32)
    offsets = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, known, BLOCK):
        at = begin + offsets
        values = tl.load(logits + at, at < known, -float("inf")).to(tl.float32)
        larger = tl.maximum(largest, values)
        total = total * tl.exp(largest - larger) + tl.exp(values - larger)
        largest = larger
    maximum = tl.max(largest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(largest - maximum), 0))
    label_logit = tl.where(has_label, label_logit - maximum, 0.0)
    lse = log_total + maximum
    tl.store(losses + row, log_total - label_logit + z_coeff * lse * lse)
    tl.store(hits + row, tl.where(label_logit >= 0.0, 1.0, 0.0))
    tl.debug_barrier()  # no warp overwrites what another has yet to read
    row_scale = weight * (1.0 + 2.0 * z_coeff * lse)
    for begin in range(0, columns, BLOCK):
        at = begin + offsets
        values = tl.load(logits + at, at < known, -float("inf")).to(tl.float32)
        gradient = tl.exp(values - lse) * row_scale - tl.where(at == label, weight, 0.0)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), at < columns)


def losses_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, known: int, z_coeff: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and hits ``[t]`` float32; ``logits`` [t, v] become the gradient of ``sum(losses * weights)``.

    Args:
        labels: ``[t]``; one that is not below ``known`` has no logit, and only the sum of the others counts.
        weights: ``[t]``.
        known: columns from here on are padding of the vocabulary and take no part.
        z_coeff: factor on the squared log-sum-exp in the loss.
    """
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    hits = torch.empty_like(losses)
    columns = logits.shape[-1]
    # Measured on an H100: a vocabulary of 128k wants one row a multiprocessor, one of 50k two.
    block = 16384 if columns > 65536 else min(triton.next_power_of_2(columns), 8192)
    _losses_and_gradient[(logits.shape[0],)](
        logits,
        labels,
        weights.float(),
        losses,
        hits,
        columns,
        min(known, columns),
        z_coeff,
        BLOCK=block,
        num_warps=max(block // 512, 4),
    )
    return losses, hits
