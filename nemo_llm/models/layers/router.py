"""The router of a mixture of experts: Megatron's choice of experts, and its losses as this trainer sums losses.

A step's gradient is that of a sum over tokens, divided once by the learned tokens of the global batch. A router's loss
is a mean over the positions of a micro-batch, so it enters that sum once for every learned token of its micro-batch:

    sum over micro-batches (cross-entropy of all tokens + coefficient x router's loss x learned tokens)
        / learned tokens of the global batch

Padding is no position of any mean. Megatron multiplies by positions where this multiplies by learned tokens: under a
loss mask its losses would weigh many times too much.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def position_facts(loss_mask: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """What a `Router` must know of each position: whether it is filled, and whether its label is learned.

    Args:
        loss_mask: ``[b, s]``, above 0 where the label is learned.
        padding: bool ``[b, s]``, True where nothing is; None where everything is filled.

    Returns:
        bool ``[b, s, 2]``.
    """
    learned = loss_mask > 0
    filled = torch.ones_like(learned) if padding is None else ~padding
    return torch.stack((filled, learned), -1)


def use_own_router(block: TransformerBlockSubmodules) -> None:
    """Put `Router` where these layers have Megatron's own; a router of a user's spec stays."""
    for layer in getattr(block, "layer_specs", None) or ():
        mlp = getattr(getattr(getattr(layer, "submodules", None), "mlp", None), "submodules", None)
        if isinstance(mlp, MoESubmodules) and mlp.router is TopKRouter:
            mlp.router = Router


class Router(TopKRouter):
    """Megatron's top-k router. In place of its padding mask it takes `position_facts`, ``[s, b, 2]`` of this rank.

    Megatron hands the mask through all layers and their recomputation, whatever its last dimension
    (megatron/patches.toml, `router`).
    """

    def is_aux_loss_enabled(self) -> bool:
        """Not by Megatron."""
        return False

    def apply_z_loss(self, logits: torch.Tensor, *_: Any, **_settings: Any) -> torch.Tensor:
        """Not by Megatron."""
        return logits

    def _apply_expert_bias(self, *_: Any, **_settings: Any) -> None:
        """Not by Megatron, whose bias counts padding too."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of each token, ``[s, b, E]`` -> probabilities and map ``[s * b, E]``; losses ride on the former."""
        probs, chosen = super().routing(logits)
        if not (self.training and torch.is_grad_enabled()):
            return probs, chosen
        facts = logits.new_ones(*logits.shape[:2], 2, dtype=torch.bool) if padding_mask is None else padding_mask
        if self.enable_expert_bias:
            with torch.no_grad():
                self.local_tokens_per_expert += (chosen & facts[..., 0].reshape(-1, 1)).sum(0)
        if self._has_loss():
            probs = MoEAuxLossAutoScaler.apply(probs, self._losses(logits, facts))
        return probs, chosen

    def _has_loss(self) -> bool:
        balances = self.get_aux_loss_coeff("aux_loss") or self.get_aux_loss_coeff("seq_aux_loss")
        return bool(balances or self.config.moe_z_loss_coeff)

    def _losses(self, logits: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """This rank's share of the losses of a micro-batch times its learned tokens; ranks of TP and CP add up."""
        s, b, experts = logits.shape
        filled, learned = facts.unbind(-1)
        flat = logits.reshape(-1, experts)
        chosen, scores = compute_routing_scores_for_aux_loss(
            flat, self.topk, self.score_function, fused=self.config.moe_router_fusion
        )
        kept = filled[..., None]
        likely = (scores.view(s, b, experts).float() * kept).sum(0)
        # One exchange: how often each expert is chosen in each sequence, positions of each, learned tokens of all.
        loads = (chosen.view(s, b, experts) & kept).sum(0)
        counts = torch.cat((loads.flatten(), filled.sum(0), learned.sum()[None])).float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        loads, positions, tokens = counts[: b * experts].view(b, experts), counts[b * experts : -1], counts[-1]
        together = positions.sum().clamp(min=1)

        total = logits.new_zeros((), dtype=torch.float32)
        if coefficient := self.get_aux_loss_coeff("aux_loss"):
            total = total + coefficient * experts / self.topk * (likely.sum(0) * loads.sum(0)).sum() / together**2
        if coefficient := self.get_aux_loss_coeff("seq_aux_loss"):
            each = (likely * loads).sum(1) / positions.clamp(min=1) ** 2
            total = total + coefficient * experts / self.topk * each.mean()
        if coefficient := self.config.moe_z_loss_coeff:
            squares = flat.float().logsumexp(-1).square().view(s, b) * filled
            total = total + coefficient * squares.sum() / together
        return total * tokens
