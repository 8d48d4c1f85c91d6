"""The state of Megatron's optimizers as tensors that know no layout, without moving a byte between ranks.

Megatron-Core 0.16.1 offers for its distributed optimizer either a form that gathers the whole state over data-parallel
ranks (``fully_reshardable``) or one that stays tied to TP and PP (``dp_reshardable``). Here each rank describes what it
owns, a range of each flattened parameter, as boxes of the parameter's global tensor (`boxes_of_range`): as cheap as the
second, as free as the first, and the same on the disk as what an optimizer that is not distributed writes. Loading
fills the optimizer's own memory.

Names of Megatron that are private to it, of 0.16.1: ``gbuf_ranges``, ``_get_model_param_range_map`` and
``_get_main_param_and_optimizer_states`` of `DistributedOptimizer`; ``float16_groups`` and its siblings of
`Float16OptimizerWithFloat16Params`. tests/models/test_megatron_contract.py fails when they are gone.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from nemo_llm.checkpoint.hyperrectangles import boxes_of_range


def optimizer_tensors(optimizer: MegatronOptimizer, model: dict) -> list[ShardedTensor]:
    """This rank's part of the optimizer's state; each tensor's data is the optimizer's own memory.

    Args:
        model: sharded state dict of the model (`weights.model_state`), whose names and offsets the state takes over.
    """
    places = {id(place.data): place for place in nested_values(model) if hasattr(place, "key")}
    found: list[ShardedTensor] = []
    for part in optimizer_parts(optimizer):
        distributed = isinstance(part, DistributedOptimizer)
        for parameter, start, main in owned_ranges(part):
            place = places[id(parameter)]
            for name, state in _states(part, parameter, main).items():
                found += _boxes(place, parameter, start, (name, state), distributed)
    return found


def optimizer_scalars(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What the state holds beside tensors: the update count and, for fp16, the loss scaler; equal on every rank."""
    parts = optimizer_parts(optimizer)
    scaler = next((part.grad_scaler for part in parts if getattr(part, "grad_scaler", None)), None)
    step = max((int(group.get("step", 0)) for part in parts for group in part.optimizer.param_groups), default=0)
    return {"step": step, "grad_scaler": scaler.state_dict() if scaler else None}


def apply_optimizer_scalars(optimizer: MegatronOptimizer, scalars: dict[str, Any]) -> None:
    """Set what `optimizer_scalars` gave; the tensors were loaded in place."""
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            group["step"] = scalars["step"]
        if getattr(part, "grad_scaler", None) and scalars["grad_scaler"]:
            part.grad_scaler.load_state_dict(scalars["grad_scaler"])


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers of dense weights and of experts, those that have something to update."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def updates_experts(part: Any) -> bool:
    """Whether this part updates weights of experts, over ranks of their own, and not dense ones."""
    return any(group["is_expert_parallel"] for group in part.optimizer.param_groups)


def owned_ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """(parameter, where this rank's range of it begins, the tensor of that range that ``part.optimizer`` updates).

    That tensor is the fp32 copy of a 16-bit parameter, and of an fp32 one its own memory.
    """
    if isinstance(part, DistributedOptimizer):
        for maps in part.gbuf_ranges:
            for buckets in maps.values():
                for bucket in buckets:
                    for parameter in bucket["param_map"]:
                        start = part._get_model_param_range_map(parameter)["param"].start
                        group, place = part.model_param_group_index_map[parameter]
                        yield parameter, start, part.optimizer.param_groups[group]["params"][place]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        halves, mains = chain(*part.float16_groups), chain(*part.fp32_from_float16_groups)
        for parameter, main in zip(halves, mains, strict=True):
            yield parameter, 0, main
        for parameter in chain(*part.fp32_from_fp32_groups):
            yield parameter, 0, parameter
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, 0, parameter


def _states(part: Any, parameter: torch.nn.Parameter, main: torch.Tensor) -> dict[str, torch.Tensor]:
    moments = part.optimizer.moments(main)
    # The main copy of an fp32 parameter is the parameter itself, which is saved with the model.
    return moments if parameter.dtype == torch.float32 else {"fp32_param": main, **moments}


def _boxes(
    place: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    start: int,
    named: tuple[str, torch.Tensor],
    distributed: bool,
) -> Iterator[ShardedTensor]:
    """``state``, elements ``[start, start + n)`` of the local parameter, as boxes of the global tensor."""
    name, state = named
    flat = state.detach().view(-1)
    stop = start + flat.numel()
    for piece in _pieces(place, parameter):
        # Where this piece (the gate or the up half of a gated layer) lies in the flattened parameter.
        begin = piece.data.storage_offset()
        low, high = max(start, begin), min(stop, begin + piece.data.numel())
        ahead = (0,) * piece.prepend_axis_num
        at = low - start
        for offset, size in boxes_of_range(tuple(piece.local_shape), low - begin, high - begin):
            count = 1
            for length in size:
                count *= length
            shape = (1,) * len(ahead) + size
            moved = zip(piece.global_offset, (*ahead, *offset), strict=True)
            # Each data-parallel rank owns another range: no replica in that, the last, direction.
            replica = (*piece.replica_id[:2], 0) if distributed else piece.replica_id
            yield ShardedTensor(
                f"optimizer.state.{name}.{piece.key}",
                flat[at : at + count].view(shape),
                flat.dtype,
                shape,
                tuple(piece.global_shape),
                tuple(a + b for a, b in moved),
                None,
                replica_id=replica,
            )
            at += count


def _pieces(place: ShardedTensor | ShardedTensorFactory, parameter: torch.nn.Parameter) -> list[ShardedTensor]:
    """The sharded tensors that a parameter is stored as, their data views of one flat memory that is never filled."""
    template = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if isinstance(place, ShardedTensorFactory):
        pieces = list(nested_values({"built": replace(place, data=template).build()}))
        assert all(piece.data.is_contiguous() for piece in pieces), f"{place.key}: pieces are no slices of rows"
        return pieces
    return [replace(place, data=template)]
