"""AdamW as Megatron's optimizers expect it from apex or Transformer Engine: one launch a parameter group on a GPU.

On CUDA the kernel of kernels/adamw.py writes the model's 16-bit weights with the fp32 ones. PyTorch's fused kernel,
which gives the same bits there, and a copy do it where moments or gradients are other tensors in each step, and on a
CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import is_
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
        self._launches: dict[int, _Launches] = {}
        self.gradients_stay = False
        """Whether gradients are the same tensors in each step: the kernel reads a table of them that is made once."""
        self.gradient_factor = 1.0
        """What ``step`` multiplies gradients by as it reads them."""
        self.halves: dict[torch.Tensor, torch.Tensor] = {}
        """The 16-bit copies, of the same shape, that ``step`` writes the parameters to as well."""

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
        """Update every parameter that has a gradient, and its 16-bit copy."""
        if closure is not None:
            raise ValueError("FusedAdamW takes no closure")
        for number, group in enumerate(self.param_groups):
            group["step"] = int(group.get("step", 0)) + 1
            if self.gradients_stay and self._host is None and any(p.is_cuda for p in group["params"][:1]):
                self._launch(number)
            elif parameters := self._updated(group):
                if self._host is None:
                    self._update(group, self._lists(parameters))
                else:
                    self.moments(parameters[0])  # the first time it makes those of all
                    self._host.update(parameters, partial(self._update, group))
                self.copy_to_halves(parameters)

    def _updated(self, group: dict[str, Any]) -> list[torch.Tensor]:
        return [p for p in group["params"] if p.grad is not None and p.numel() > 0 and self._by_adamw(p)]

    def copy_to_halves(self, parameters: list[torch.Tensor]) -> None:
        """Write these parameters to their 16-bit copies, where they have any."""
        if copied := [p for p in parameters if p in self.halves]:
            torch._foreach_copy_([self.halves[p] for p in copied], copied)  # few launches; underscored like all lists

    def _lists(self, parameters: list[torch.Tensor]) -> Lists:
        first, second = zip(*(self.moments(parameter).values() for parameter in parameters), strict=True)
        return parameters, [p.grad for p in parameters], list(first), list(second)

    def _launch(self, number: int) -> None:
        """Update the group with this number by the kernel, the parameters with 16-bit copies apart."""
        from nemo_llm.kernels.adamw import AdamWPass, AdamWRule

        group = self.param_groups[number]
        gradients = [parameter.grad for parameter in group["params"]]
        known = self._launches.get(number)
        if known is None or not known.fit(self.state, gradients):
            passes = []
            for halves in (True, False):
                if alike := [p for p in self._updated(group) if (p in self.halves) == halves]:
                    copies = [[self.halves[p] for p in alike]] if halves else []
                    passes.append(AdamWPass([*self._lists(alike), *copies]))
            self._launches[number] = known = _Launches(self.state, gradients, passes)
        settings = {name: group[name] for name in ("step", "lr", "betas", "eps", "weight_decay")}
        for one in known.passes:
            one.run(AdamWRule(**settings, divisor=1.0 / self.gradient_factor))

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


@dataclass(frozen=True)
class _Launches:
    """The launches of a group, good as long as state and gradients are these objects."""

    state: Any
    gradients: list[Any]
    passes: list[Any]

    def fit(self, state: Any, gradients: list[Any]) -> bool:
        same = len(gradients) == len(self.gradients) and all(map(is_, gradients, self.gradients))
        return same and state is self.state
