"""The order of a sequence under context parallelism, and the exchanges that attention needs.

With ``cp`` ranks a sequence is cut into ``2 cp`` chunks and rank ``r`` holds chunks ``r`` and ``2 cp - 1 - r``, one
early and one late, so that causal attention costs every rank the same (Megatron's zig-zag order; Megatron's rotary
embedding and data helpers follow it too). Shapes: ``s`` full sequence, ``b`` micro-batch, ``n`` heads, ``d`` head size.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all


def zigzag_order(cp: int) -> list[int]:
    """Chunk numbers in the order in which they lie after the ranks' parts are concatenated: 0, 2n-1, 1, 2n-2, ..."""
    return [chunk for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)]


def take_local_chunks(full: torch.Tensor, cp_rank: int, cp: int, dim: int) -> torch.Tensor:
    """This rank's two chunks of a full sequence along ``dim``: length s -> s/cp."""
    if cp == 1:
        return full
    chunks = full.chunk(2 * cp, dim)
    return torch.cat((chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]), dim)


def _reorder(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    chunks = x.chunk(len(order), 0)
    return torch.cat([chunks[i] for i in order], 0)


def to_natural_order(x: torch.Tensor, cp: int) -> torch.Tensor:
    """[s, ...] with the ranks' zig-zag parts one after another -> [s, ...] in reading order."""
    order = zigzag_order(cp)
    return _reorder(x, [order.index(i) for i in range(2 * cp)])


def to_zigzag_order(x: torch.Tensor, cp: int) -> torch.Tensor:
    """Inverse of `to_natural_order`."""
    return _reorder(x, zigzag_order(cp))


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s/cp, b, n, d] -> [s, b, n, d] in reading order; the backward pass reduce-scatters."""
    return to_natural_order(gather_from_sequence_parallel_region(x, group=group), group.size())


def heads_to_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Ulysses exchange (DeepSpeed-Ulysses, arXiv:2309.14509): [s/cp, b, n, d] -> [s, b, n/cp, d] in reading order."""
    cp = group.size()
    s, b, n, d = x.shape
    by_destination = x.view(s, b, cp, n // cp, d).permute(2, 0, 1, 3, 4).contiguous()
    received = all_to_all(group, by_destination.view(cp * s, b, n // cp, d))
    return to_natural_order(received, cp)


def sequence_to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Inverse of `heads_to_sequence`: [s, b, n/cp, d] in reading order -> [s/cp, b, n, d]."""
    cp = group.size()
    s, b, n, d = x.shape
    received = all_to_all(group, to_zigzag_order(x, cp).contiguous())
    return received.view(cp, s // cp, b, n, d).permute(1, 2, 0, 3, 4).reshape(s // cp, b, cp * n, d)
