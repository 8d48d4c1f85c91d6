"""Initial weights as a pure function of (seed, parameter name, global position).

Every element is computed from a counter, never drawn from a generator: its key in the layout-free checkpoint and its
index in the whole tensor. A rank computes its own shard alone, whatever TP, PP, EP or DP it belongs to and on CPU or
GPU, and all layouts start from one model.

The counter is hashed with the 32-bit finaliser of MurmurHash3 (A. Appleby, public domain) and made normal by the
Box-Muller transform. Integer arithmetic is exact on every device; the transform differs by float rounding alone.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

_MASK = 0xFFFFFFFF
# Elements at a time. On a GPU they bound the int64 work space to some 100 MB; on a CPU that space must fit its cache:
# 51 million elements a second instead of 5 on two cores.
_CHUNK_ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 17}


@dataclass(frozen=True)
class InitRule:
    """Standard deviations of matrices and of those that write into the residual stream; weight of the norms."""

    std: float
    residual_std: float
    norm_weight: float


def initialize_weights(chunks: list[MegatronModule], seed: int, rule: InitRule) -> None:
    """Fill every parameter of these model chunks (this rank's part, one a virtual pipeline stage) in place."""
    with torch.no_grad():
        for chunk in chunks:
            storages = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
            for shard in _shards(chunk.sharded_state_dict()):
                # Buffers (an expert bias, say) are in the state dict too and keep what their module gave them.
                if shard.data is not None and shard.data.untyped_storage().data_ptr() in storages:
                    _fill(shard, seed, rule)


def _shards(node: object) -> Iterator[ShardedTensor]:
    if isinstance(node, ShardedTensorFactory):
        yield from _shards(node.build())
    elif isinstance(node, ShardedTensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _shards(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _shards(value)


def _fill(shard: ShardedTensor, seed: int, rule: InitRule) -> None:
    module, leaf = shard.key.split(".")[-2:]
    if leaf.endswith("bias"):
        shard.data.zero_()
    elif "norm" in leaf or "norm" in module:
        shard.data.fill_(rule.norm_weight)
    else:
        writes_residual = shard.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        _fill_normal(shard, _key_of(seed, shard.key), rule.residual_std if writes_residual else rule.std)


def fill_normal(shard: ShardedTensor, seed: int, std: float) -> None:
    """Fill one shard in place, by the same rule as all weights: a function of seed, name and global position."""
    _fill_normal(shard, _key_of(seed, shard.key), std)


def _key_of(seed: int, name: str) -> tuple[int, int, int]:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    first, second, third = (int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(3))
    return first, second, third


def _fill_normal(shard: ShardedTensor, key: tuple[int, int, int], std: float) -> None:
    """Write ``std * normal(key, index)`` for the global flat indices of the shard."""
    local, device = shard.data, shard.data.device
    row_length = local.shape[-1]
    rows = local.view(-1, row_length)
    row_starts = _global_row_starts(shard, device)
    rows_at_once = max(1, _CHUNK_ELEMENTS[device.type] // row_length)
    columns = torch.arange(row_length, device=device, dtype=torch.int64)
    for first in range(0, rows.shape[0], rows_at_once):
        index = row_starts[first : first + rows_at_once, None] + columns
        rows[first : first + rows_at_once] = (normal_at(index, key) * std).to(rows.dtype)


def _global_row_starts(shard: ShardedTensor, device: torch.device) -> torch.Tensor:
    """Flat index, in the whole tensor, of the first element of each local row: int64 [local rows]."""
    strides = [1]
    for size in reversed(shard.global_shape[1:]):
        strides.insert(0, strides[0] * size)
    start = sum(offset * stride for offset, stride in zip(shard.global_offset, strides, strict=True))
    starts = torch.tensor([start], device=device, dtype=torch.int64)
    # Axes that stand for the layer or the expert have one entry here and are no axes of the local tensor.
    for size, stride in zip(shard.data.shape[:-1], strides[shard.prepend_axis_num : -1], strict=True):
        steps = torch.arange(size, device=device, dtype=torch.int64) * stride
        starts = (starts[:, None] + steps).flatten()
    return starts


def normal_at(index: torch.Tensor, key: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal float32 for each int64 counter in ``index``, the same on every device up to rounding."""
    low, high = index & _MASK, index >> 32
    base = _mix(low ^ _mix((high ^ key[0]) & _MASK))
    first, second = _mix(base ^ key[1]), _mix((base + key[2]) & _MASK)
    # (0, 1]: the logarithm below must not see zero.
    radius = torch.sqrt(-2.0 * torch.log((first.double() + 1.0) * (1.0 / 4294967296.0)))
    return (radius * torch.cos(second.double() * (2.0 * math.pi / 4294967296.0))).float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser on values in [0, 2^32) held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
