"""The base of adapters on linear layers, and the two simple ones: IA3 and the bottleneck."""

import abc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from nemo_llm.peft.adapter import Adapter, Placement
from nemo_llm.peft.linear import LinearPart, LinearPlace


class LinearAdapter(Adapter, abc.ABC):
    """Changes what one linear layer computes: `before` its inputs, `after` its outputs."""

    def __init__(self, place: LinearPlace) -> None:
        super().__init__()
        self.place = place

    def add_split(
        self, name: str, value: torch.Tensor, full_name: str, *, split_dim: int | None, sums_tokens: bool
    ) -> None:
        """Register a parameter with the marks by which Megatron reduces and counts its gradient.

        Args:
            split_dim: dimension that tensor parallelism splits; None when whole on every rank.
            sums_tokens: under sequence parallelism each rank sees a part of the tokens that its gradient sums over.
        """
        place = self.place
        rank, size = place.group.rank(), place.group.size()
        groups = place.pg_collection
        replica = dist.get_rank(groups.expt_dp if place.expert else groups.dp_cp)
        self.add(
            name,
            value,
            Placement(full_name, split_dim, (rank, size), replica),
            # What is split counts on every rank in the norm of the gradients, what is whole on the first one alone.
            tensor_model_parallel=split_dim is not None and size > 1,
            sequence_parallel=place.sequence_parallel and sums_tokens,
            allreduce=getattr(place.linear.weight, "allreduce", True),
        )

    @abc.abstractmethod
    def initial_std(self, placement: Placement) -> float | None:
        """Standard deviation of a parameter's initial values; None leaves what it was made with."""

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the frozen layer, and what `after` needs of them: the inputs themselves unless said otherwise."""
        return x, x

    @abc.abstractmethod
    def after(
        self, kept: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs and the bias that Megatron adds later, from those of the frozen layer and what `before` kept."""

    def merge(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of a plain layer that does the same, fp32 and of this rank; None where there is none."""
        return None


class Ia3Adapter(LinearAdapter):
    """Learned factors on outputs, or, for the layer that ends the MLP (``linear_fc2``), on inputs.

    Args:
        place: the layer.
        parts: parts whose outputs are scaled.
    """

    def __init__(self, place: LinearPlace, parts: tuple[LinearPart, ...]) -> None:
        super().__init__(place)
        self.parts = parts
        self.on_inputs = place.name.endswith("linear_fc2")
        weight = place.linear.weight
        if self.on_inputs:
            name = f"{place.part_name(parts[0])}.ia3"
            self.add_split("factors", weight.new_ones(place.in_features), name, split_dim=0, sums_tokens=False)
            return
        for part in parts:
            self.add_split(
                f"{part.leaf}_factors",
                weight.new_ones(part.rows),
                f"{place.part_name(part)}.ia3",
                split_dim=0 if place.column else None,
                sums_tokens=not place.column,
            )

    def initial_std(self, _placement: Placement) -> float | None:
        """Factors start at one."""
        return None

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled inputs of ``linear_fc2``."""
        return x * self.factors if self.on_inputs else x, x

    def after(
        self, _x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled outputs of any other layer."""
        if self.on_inputs:
            return out, bias
        factors = self._output_factors()
        return out * factors, None if bias is None else bias * factors

    def merge(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Factors multiplied into rows (and the bias), or into columns."""
        linear = self.place.linear
        weight, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
        if self.on_inputs:
            return weight * self.factors.float(), bias
        factors = self._output_factors().float()
        return weight * factors[:, None], None if bias is None else bias * factors

    def _output_factors(self) -> torch.Tensor:
        place = self.place
        weight = place.linear.weight
        learned = [
            getattr(self, f"{part.leaf}_factors") if part in self.parts else weight.new_ones(part.rows)
            for part in place.parts
        ]
        factors = place.assemble(learned)
        if place.tokens_exchanged and not place.column and place.group.size() > 1:
            factors = copy_to_tensor_model_parallel_region(factors, group=place.group)
        return factors


class BottleneckAdapter(LinearAdapter):
    """``y + U gelu(D y)`` on the output of a row-parallel layer; whole on every rank, being small.

    Args:
        place: the layer.
        size: width of the bottleneck.
    """

    def __init__(self, place: LinearPlace, size: int) -> None:
        super().__init__(place)
        weight = place.linear.weight
        width = weight.shape[0]
        shapes = {"down": (size, width), "down_bias": (size,), "up": (width, size), "up_bias": (width,)}
        for name, shape in shapes.items():
            full = f"{place.name}.adapter_{name}"
            self.add_split(name, weight.new_zeros(shape), full, split_dim=None, sums_tokens=True)

    def initial_std(self, placement: Placement) -> float | None:
        """Of the first matrix; the second starts at zero, so that nothing changes at first."""
        return 0.02 if placement.name.endswith("adapter_down") else None

    def after(
        self, _x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs with the bias that Megatron would add later, through the bottleneck."""
        out = out if bias is None else out + bias
        return out + F.linear(F.gelu(F.linear(out, self.down, self.down_bias)), self.up, self.up_bias), None
