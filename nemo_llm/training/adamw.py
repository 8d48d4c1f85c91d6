"""AdamW as Megatron's optimizers expect it from apex or Transformer Engine, on PyTorch's fused kernel."""

from collections.abc import Callable
from typing import Any

import torch


class FusedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101) in one fused pass over all parameters.

    The step number lives in the parameter group, where Megatron's checkpoint code looks for it; PyTorch's own AdamW
    keeps one tensor a parameter, on which saving and loading the distributed optimizer stumble.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as in the paper; ``eps`` is added outside the square root.
        adam_w_mode: accepted for Megatron's sake; only decoupled decay is done.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("FusedAdamW does decoupled weight decay alone: adam_w_mode=False was asked for")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdamW takes no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            group["step"] = int(group.get("step", 0)) + 1
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        device = parameters[0].device
        steps = torch.full((), float(group["step"]), dtype=torch.float32, device=device)
        torch._fused_adamw_(  # public kernel of torch.optim.AdamW(fused=True); underscored name since torch 2.0
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [steps] * len(parameters),
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )
