"""AdamW as Megatron's optimizers expect it from apex or Transformer Engine, on PyTorch's fused kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nemo_llm.optim.host_offload import HostMoments, Lists


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
        self._host: HostMoments | None = None
        self.gradient_factor = 1.0
        """What ``step`` multiplies gradients by as it reads them."""

    def offload_moments(self) -> None:
        """Keep the moments in host memory from now on; before there are any."""
        self._host = HostMoments()

    def moment_names(self, _parameter: torch.Tensor, /) -> tuple[str, ...]:
        """Keys of the state tensors that this parameter has, each of its shape."""
        return ("exp_avg", "exp_avg_sq")

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state tensors of a parameter, zeros before the first update; those in host memory are up to date."""
        state = self.state[parameter]
        if self._host is not None and self._by_adamw(parameter):
            self._host.wait()
            if not state:
                for group in self.param_groups:
                    self._host.add([p for p in group["params"] if p.numel() > 0 and self._by_adamw(p)], self.state)
        for name in self.moment_names(parameter):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return {name: state[name] for name in self.moment_names(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("FusedAdamW takes no closure")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.numel() > 0 and self._by_adamw(p)]
            group["step"] = int(group.get("step", 0)) + 1
            if not parameters:
                continue
            if self._host is not None:
                self.moments(parameters[0])  # the first time it makes those of all
                self._host.update(parameters, partial(self._update, group))
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.moments(parameter)
            first, second = ([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
            self._update(group, (parameters, [p.grad for p in parameters], first, second))

    def _by_adamw(self, _parameter: torch.Tensor, /) -> bool:
        return True

    def _update(self, group: dict[str, Any], lists: Lists) -> None:
        """AdamW for parameters, gradients, first and second moments, each a list of as many tensors."""
        parameters, gradients, first, second = lists
        steps = torch.full((), float(group["step"]), dtype=torch.float32, device=parameters[0].device)
        divisor = None if self.gradient_factor == 1.0 else torch.full_like(steps, 1.0 / self.gradient_factor)
        torch._fused_adamw_(  # public kernel of torch.optim.AdamW(fused=True); underscored name since torch 2.0
            parameters,
            gradients,
            first,
            second,
            [],
            [steps] * len(parameters),
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=divisor,
            found_inf=None,
        )
