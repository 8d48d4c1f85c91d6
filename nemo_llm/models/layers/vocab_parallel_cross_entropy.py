"""Next-token cross-entropy over a vocabulary that is split across tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy with optional z-loss from logits ``[tokens, v/tp]``, statistics in float32.

    With ``lse`` the log-sum-exp of a token's logits, its loss is ``lse - logit[label] + z_coeff * lse^2`` (z-loss:
    PaLM, arXiv:2204.02311 §5). The ranks exchange three numbers a token: maximum, sum and the label's logit.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, z_coeff: float, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and hits, both ``[tokens]`` float32, of ``logits`` ``[tokens, v/tp]`` and ``labels`` ``[tokens]``.

        A hit is 1 where no token has a larger logit than the label.
        """
        first = group.rank() * logits.shape[-1]
        outside = (labels < first) | (labels >= first + logits.shape[-1])
        local_labels = torch.where(outside, 0, labels - first)
        scaled = logits.float()
        maximum = scaled.amax(-1)
        if group.size() > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        scaled = scaled - maximum[:, None]
        label_logit = scaled.gather(-1, local_labels[:, None]).squeeze(-1).masked_fill(outside, 0.0)
        exponentials = scaled.exp_()
        stats = torch.stack((exponentials.sum(-1), label_logit))
        if group.size() > 1:
            dist.all_reduce(stats, group=group)
        total, label_logit = stats
        log_total = total.log()
        ctx.save_for_backward(exponentials.div_(total[:, None]), local_labels, outside, log_total + maximum)
        ctx.z_coeff, ctx.dtype = z_coeff, logits.dtype
        losses = log_total - label_logit
        if z_coeff:
            losses = losses + z_coeff * (log_total + maximum).square()
        hits = (label_logit >= 0).float()
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient ``(softmax * (1 + 2 z lse) - onehot) * grad`` in the dtype of the logits."""
        probabilities, local_labels, outside, lse = ctx.saved_tensors
        row_scale = grad * (1.0 + 2.0 * ctx.z_coeff * lse) if ctx.z_coeff else grad
        result = probabilities * row_scale[:, None]
        result.scatter_add_(-1, local_labels[:, None], (-grad).masked_fill(outside, 0.0)[:, None])
        return result.to(ctx.dtype), None, None, None
