"""Next-token prediction: the forward step that Megatron's schedules call for every micro-batch."""

from collections.abc import Callable, Iterator

import torch

MicroBatch = dict[str, torch.Tensor]
"""``tokens``, ``labels``, ``loss_mask``, ``position_ids``: ``[b, s/cp]``; ``padding``, bool ``[b, s/cp]``, absent when
every position is filled; ``document_ids``: ``[b, s]``, absent when documents may see each other."""

LossSum = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def forward_step(
    micro_batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossSum]]:
    """Run one micro-batch through this pipeline stage; the closure turns the last stage's output into a loss."""
    batch = next(micro_batches)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=batch.get("document_ids"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=batch.get("padding"),
    )
    return output, lambda losses: sum_losses(losses, batch["loss_mask"])


def sum_losses(losses: torch.Tensor, loss_mask: torch.Tensor) -> LossSum:
    """Sum the losses of the tokens that count.

    Args:
        losses: ``[b, s/cp]`` per token; in evaluation ``[2, b, s/cp]``, the second row being 1 for a right guess.
        loss_mask: ``[b, s/cp]``, 1 where the token counts.

    Returns:
        The sum (differentiable), the number of tokens (int32), and ``[loss, tokens, hits]`` in float64 for the log.
        Nothing is divided here: the optimizer's factor divides once, by the token count of the global batch.
    """
    mask = loss_mask.float()
    per_token = losses if losses.dim() == 2 else losses[0]
    total = (per_token * mask).sum()
    hits = torch.zeros_like(total) if losses.dim() == 2 else (losses[1] * mask).sum()
    counted = mask.sum()
    logged = torch.stack((total.detach().double(), counted.double(), hits.detach().double()))
    return total, counted.to(torch.int), {"sums": logged}
