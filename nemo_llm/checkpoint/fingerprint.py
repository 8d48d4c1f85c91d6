"""A number that names a model's weights, the same on every layout and whether they are held in bf16 or fp32."""

import hashlib

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

from nemo_llm.checkpoint.weights import model_state
from nemo_llm.models.layers.classification_head import HEAD_PREFIX

_CHUNK_ELEMENTS = 1 << 24
_MASK = (1 << 63) - 1


@torch.no_grad()
def weights_fingerprint(chunks: list[torch.nn.Module], device: torch.device) -> str:
    """Sixteen hexadecimal digits; a collective of all ranks.

    The bits of all elements, rounded to bf16, are added up as integers, each tensor's sum times a hash of its name and
    layer. Integer sums are the same in any order, so however ranks share a tensor. A head does not count: it is trained
    where the rest is frozen.
    """
    state = model_state(chunks)
    apply_factories(state)
    total = 0
    for tensor in nested_values(state):
        if not isinstance(tensor, ShardedTensor) or tensor.key.startswith(HEAD_PREFIX):
            continue
        if tensor.data is not None and is_main_replica(tensor.replica_id):
            layer = tensor.global_offset[: tensor.prepend_axis_num]
            digest = hashlib.sha256(f"{tensor.key}/{layer}".encode()).digest()
            total += _sum_of_bits(tensor.data) * (int.from_bytes(digest[:8], "little") | 1)
    summed = torch.tensor(_signed(total), dtype=torch.int64, device=device)
    dist.all_reduce(summed)  # wraps around as the sums before it do
    return f"{int(summed.item()) % (1 << 64):016x}"


def _sum_of_bits(tensor: torch.Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    return sum(
        int(part.to(torch.bfloat16).view(torch.int16).to(torch.int64).sum().item())
        for part in flat.split(_CHUNK_ELEMENTS)
    )


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value > _MASK else value
