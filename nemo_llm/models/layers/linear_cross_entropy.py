"""Output projection and cross-entropy in one, a chunk of tokens at a time: the whole logits never exist.

For a vocabulary of 128k the logits of 16k tokens take 4 GB in bf16 and are read and written several times over. Here
each chunk's logits are made, turned into their gradient in place and multiplied back at once (the idea of Liger Kernel,
arXiv:2410.10989, with vocabulary parallelism added). The gradient of a token's loss is taken with the weight that the
token has in the sum, 1 or 0, so the caller must sum ``losses * loss_mask``; that is why 16-bit loss scaling, whose
factor comes later, does not use this path. Any other loss would train on the gradients of that sum: on CPU and in
deterministic mode the backward pass compares the gradient that comes in with the mask, and raises where they differ.

Shapes: ``T`` tokens of this rank, ``h`` hidden size, ``v/tp`` this rank's part of the padded vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemo_llm.kernels.matmul import add_weight_gradient, input_gradient, project
from nemo_llm.models.layers.main_grad import gradient_buffer, returned_gradient


@dataclass(frozen=True)
class LossRule:
    """What the loss is: number of known tokens in this rank's part of the vocabulary, z-loss, logit cap, chunk.

    ``tied`` says that the weight is the embedding of the same model chunk; ``group`` is the tensor-parallel one.
    """

    known_here: int
    z_coeff: float
    softcapping: float | None
    chunk_tokens: int
    tied: bool
    group: dist.ProcessGroup


@dataclass(frozen=True)
class LossInputs:
    """Labels and mask ``[T]``, the rule, and the weight where it is not the output layer's own."""

    labels: torch.Tensor
    loss_mask: torch.Tensor
    rule: LossRule
    tied_weight: torch.Tensor | None


class LinearCrossEntropy(torch.autograd.Function):
    """Losses of a chunked output projection; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        rule: LossRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` [T, h], ``weight`` [v/tp, h], ``labels`` and ``loss_mask`` [T] -> losses and hits [T], float32.

        With gradients enabled the gradient of ``sum(losses * loss_mask)`` is kept for ``hidden``, and that of
        ``weight`` is added to ``weight.main_grad`` where there is one.
        """
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        hits = torch.empty_like(losses)
        hidden_grad = torch.empty_like(hidden) if wanted else None
        weight_grad = gradient_buffer(weight) if wanted and ctx.needs_input_grad[1] else None
        for start in range(0, labels.shape[0], rule.chunk_tokens):
            part = slice(start, start + rule.chunk_tokens)
            logits = project(hidden[part], weight)
            if hidden_grad is None:
                losses[part], hits[part] = _to_losses(logits, labels[part], rule)
            else:
                losses[part], hits[part] = _to_losses_and_gradient(logits, labels[part], loss_mask[part], rule)
                input_gradient(logits, weight, out=hidden_grad[part])
            if weight_grad is not None:
                add_weight_gradient(weight_grad, logits, hidden[part])
            del logits  # before the next chunk's are made: they are the largest tensor of many a step
        ctx.save_for_backward(hidden_grad, loss_mask if wanted else None)
        ctx.weight = weight
        ctx.weight_grad = weight_grad
        ctx.tied = rule.tied
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses_grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients that the forward pass took, which are right if ``losses_grad`` [T] is the loss mask.

        Raises:
            RuntimeError: it is not, where that is compared: on CPU, and in deterministic mode. Elsewhere the
                comparison would let the host wait for the GPU in every micro-batch.
        """
        hidden_grad, loss_mask = ctx.saved_tensors
        if losses_grad.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
            _check_contract(losses_grad, loss_mask)
        return hidden_grad, returned_gradient(ctx.weight, ctx.weight_grad, ctx.tied), None, None, None


def _check_contract(losses_grad: torch.Tensor, loss_mask: torch.Tensor) -> None:
    if torch.equal(losses_grad, loss_mask.to(losses_grad.dtype)):
        return
    raise RuntimeError(
        "the fused output projection and loss took the gradient of sum(losses * loss_mask), and the loss that was "
        "differentiated is another: its gradient with respect to the losses is not the loss mask. Sum the losses with "
        "that mask and no further factor, or set performance.fused_linear_cross_entropy=false"
    )


def _to_losses(logits: torch.Tensor, labels: torch.Tensor, rule: LossRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and hits ``[t]`` of logits ``[t, v/tp]``, which are overwritten."""
    chunk = _Chunk(logits, labels, rule)
    return chunk.losses, chunk.hits


def _to_losses_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, rule: LossRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and hits ``[t]``; the logits ``[t, v/tp]`` become the gradient of the weighted loss."""
    if logits.is_cuda and rule.group.size() == 1 and rule.softcapping is None:
        from nemo_llm.kernels.cross_entropy_inplace import losses_and_gradient

        return losses_and_gradient(logits, labels, loss_mask, rule.known_here, rule.z_coeff)
    chunk = _Chunk(logits, labels, rule)
    chunk.to_gradient(loss_mask)
    return chunk.losses, chunk.hits


class _Chunk:
    """Loss statistics of one chunk of logits ``[t, v/tp]``, which it owns and overwrites."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor, rule: LossRule) -> None:
        self.logits, self.rule, group = logits, rule, rule.group
        columns = logits.shape[-1]
        if rule.known_here < columns:
            logits[:, max(rule.known_here, 0) :] = torch.finfo(logits.dtype).min
        first = group.rank() * columns
        outside = (labels < first) | (labels >= first + columns)
        self.local_labels = torch.where(outside, 0, labels - first)
        self.label_here = ~outside
        if rule.softcapping is not None:
            logits.copy_(rule.softcapping * torch.tanh(logits.float() / rule.softcapping))
            if rule.known_here < columns:
                logits[:, max(rule.known_here, 0) :] = torch.finfo(logits.dtype).min
        local_maximum, total = compile_for_loss(logits.device.type)[0](logits)
        maximum = local_maximum.clone()
        if group.size() > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        label_logit = logits.gather(-1, self.local_labels[:, None]).squeeze(-1).float()
        label_logit = torch.where(self.label_here, label_logit - maximum, 0.0)
        if group.size() > 1:
            both = torch.stack((total * torch.exp(local_maximum - maximum), label_logit))
            dist.all_reduce(both, group=group)
            total, label_logit = both
        self.lse = total.log() + maximum
        self.losses = total.log() - label_logit
        if rule.z_coeff:
            self.losses = self.losses + rule.z_coeff * self.lse.square()
        self.hits = (label_logit >= 0).float()

    def to_gradient(self, loss_mask: torch.Tensor) -> None:
        """Turn the logits into the gradient of the chunk's weighted loss with respect to the projection's output."""
        weight = loss_mask.float()
        row_scale = weight * (1.0 + 2.0 * self.rule.z_coeff * self.lse) if self.rule.z_coeff else weight
        label_share = torch.where(self.label_here, weight, 0.0)
        if self.rule.softcapping is None:
            to_gradient = compile_for_loss(self.logits.device.type)[1]
            to_gradient(self.logits, self.lse, row_scale, label_share, self.local_labels)
            return
        # d tanh: the capped logits are at hand, 1 - (capped / cap)^2 of each.
        slope = 1.0 - (self.logits.float() / self.rule.softcapping).square().clamp(max=1.0)
        gradient = torch.exp(self.logits.float() - self.lse[:, None]) * row_scale[:, None]
        gradient.scatter_add_(-1, self.local_labels[:, None], -label_share[:, None])
        self.logits.copy_(gradient * slope)


def _statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of exponentials below it of each row, in one pass over the logits where compiled."""
    values = logits.float()
    maximum = values.amax(-1)
    return maximum, torch.exp(values - maximum[:, None]).sum(-1)


def _to_gradient(
    logits: torch.Tensor,
    lse: torch.Tensor,
    row_scale: torch.Tensor,
    label_share: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    columns = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = torch.exp(logits.float() - lse[:, None]) * row_scale[:, None]
    logits.copy_(torch.where(columns[None] == labels[:, None], probabilities - label_share[:, None], probabilities))


@cache
def compile_for_loss(device_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Statistics of a chunk's logits, and their gradient in place: one kernel each on CUDA.

    As written on CPU, where compiling takes longer than it saves.
    """
    if device_type != "cuda":
        return _statistics, _to_gradient
    return torch.compile(_statistics, dynamic=False), torch.compile(_to_gradient, dynamic=False)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Next-token cross-entropy with optional z-loss from logits ``[tokens, v/tp]``, statistics in float32.

    The vocabulary is split across tensor-parallel ranks.

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
