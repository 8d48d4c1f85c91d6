"""The state of Megatron's optimizers as tensors that know no layout, without moving a byte between ranks.

Megatron-Core offers for its distributed optimizer either a form that gathers the whole state over data-parallel
ranks (``fully_reshardable``) or one that stays tied to TP and PP (``dp_reshardable``). Here each rank describes what it
owns, a range of each flattened parameter, as boxes of the parameter's global tensor (`boxes_of_range`): as cheap as the
second, as free as the first, and the same on the disk as what an optimizer that is not distributed writes. Loading
fills the optimizer's own memory.

Where a range is cut depends on the number of data-parallel ranks. Boxes (an offset and a size in each dimension) can be
read by any other layout. Every range is a few boxes: the end of one row, whole rows, the beginning of another, and the
same again inside those rows.

What each rank owns is private to Megatron's optimizers (megatron/patches.toml, `optimizer_state`).
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_llm.megatron.optimizer import optimizer_parts, owned_ranges


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


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of boxes that make up elements ``[start, stop)`` of a row-major ``shape``, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (((start,), (stop - start,)) if shape else ((), ()))
        return
    inner = prod(shape[1:])
    first_whole, end_whole = -(-start // inner), stop // inner
    if first_whole > end_whole:  # inside one row
        yield from _in_row(shape, start // inner, start % inner, stop - (start // inner) * inner)
        return
    if start % inner:
        yield from _in_row(shape, first_whole - 1, start % inner, inner)
    if first_whole < end_whole:
        rest = shape[1:]
        yield (first_whole, *(0 for _ in rest)), (end_whole - first_whole, *rest)
    if stop % inner:
        yield from _in_row(shape, end_whole, 0, stop % inner)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes_of_range(shape[1:], start, stop):
        yield (row, *offset), (1, *size)
