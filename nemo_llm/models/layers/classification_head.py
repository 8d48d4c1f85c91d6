"""A head in place of the output layer: a logit for each class, or a score, from the last token's hidden state."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

HEAD_PREFIX = "score."
"""Begins the head's names in checkpoints; what Hugging Face's ``...ForSequenceClassification`` models call theirs."""


class ScoreHead(MegatronModule):
    """A linear layer without bias, whole on every tensor-parallel rank: it is as small as the number of classes.

    It runs at every position, and the loss mask chooses those that end a text. Several texts can so share a sample, and
    context parallelism needs no special case.
    """

    def __init__(self, config: TransformerConfig, outputs: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.empty(outputs, config.hidden_size, dtype=config.params_dtype))
        self.group = pg_collection.tp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits ``[s/cp, b, outputs]`` of ``hidden`` ``[s/cp(/tp), b, h]``."""
        if self.config.sequence_parallel:
            # Every rank computes the same loss from the gathered states, so each takes its own part of the gradient.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.group)
        return F.linear(hidden, self.weight).float()


def head_losses(logits: torch.Tensor, labels: torch.Tensor, training: bool) -> torch.Tensor:
    """Loss of each position: cross-entropy over the classes, or the squared error of a single score.

    Args:
        logits: ``[s/cp, b, outputs]``.
        labels: ``[b, s/cp]``, the number of a class or the score that is wanted; anything where nothing is masked in.
        training: whether losses alone are wanted.

    Returns:
        ``[b, s/cp]``; in evaluation ``[2, b, s/cp]``, the second row 1 where the class is right (0 for a score).
    """
    by_row = logits.transpose(0, 1)
    if by_row.shape[-1] == 1:
        losses = (by_row[..., 0] - labels.float()).square()
        hits = torch.zeros_like(losses)
    else:
        classes = labels.long()
        losses = F.cross_entropy(by_row.flatten(0, 1), classes.flatten(), reduction="none").view(classes.shape)
        hits = (by_row.argmax(-1) == classes).float()
    return losses if training else torch.stack((losses, hits))
