"""The peer: a Llama of plain PyTorch, compiled, as PyTorch's own documentation advises to train it.

``python -m benchmarks.peer_pytorch --micro-batch 8 --micro-batches 2`` on one GPU: whole-model ``torch.compile``, autocast to bf16
over fp32 parameters, fused AdamW. Under torchrun: FSDP2 with bf16 compute and fp32 reduction, parameters kept gathered between
forward and backward, each block compiled. Random tokens. Prints one JSON line beginning with RESULT, in the terms of step_speed.
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SHAPES = {
    "llama3_1b": {"layers": 16, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 8192, "vocab": 128256, "tied": True},
    "llama3_8b": {"layers": 32, "hidden": 4096, "heads": 32, "groups": 8, "ffn": 14336, "vocab": 128256, "tied": False},
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "groups": 2, "ffn": 128, "vocab": 512, "tied": True},
}


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention and SwiGLU."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        hidden, self.head = shape["hidden"], shape["hidden"] // shape["heads"]
        self.keys = shape["groups"] * self.head
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, hidden + 2 * self.keys, bias=False)
        self.proj = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * shape["ffn"], bias=False)
        self.down = nn.Linear(shape["ffn"], hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        parts = self.qkv(self.attention_norm(x)).split([hidden, self.keys, self.keys], -1)
        q, k, v = (part.view(batch, length, -1, self.head).transpose(1, 2) for part in parts)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [b, n, s, d] by tables [s, d/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Llama(nn.Module):
    """Embedding, blocks, norm, logits."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape["vocab"], shape["hidden"])
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape["layers"]))
        self.norm = nn.RMSNorm(shape["hidden"], eps=1e-5)
        self.head = nn.Linear(shape["hidden"], shape["vocab"], bias=False)
        if shape["tied"]:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def build(arguments: argparse.Namespace, shape: dict, device: torch.device):
    """The model, ready to be called, and what computes its loss."""
    model = Llama(shape).to(device)
    if not dist.is_initialized():

        def whole(tokens, labels, cos, sin):
            with torch.autocast(device.type, torch.bfloat16):
                return loss_of(model(tokens, cos, sin), labels)

        return model, torch.compile(whole) if arguments.compile else whole
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        if arguments.compile:
            block.compile()
        fully_shard(block, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mp_policy=policy)
    criterion = torch.compile(loss_of) if arguments.compile else loss_of
    return model, lambda tokens, labels, cos, sin: criterion(model(tokens, cos, sin), labels)


def main() -> None:
    """Warm up, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="llama3_1b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--name", default="plain PyTorch")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model] | ({"layers": arguments.layers} if arguments.layers else {})
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(rank)
    model, loss_function = build(arguments, shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    half = shape["hidden"] // shape["heads"] // 2
    angles = torch.outer(torch.arange(arguments.seq), 500000.0 ** (-torch.arange(half) / half))
    cos, sin = (table.to(device, torch.bfloat16) for table in (angles.cos(), angles.sin()))
    times = []
    for _ in range(arguments.warm + arguments.steps):
        began = time.perf_counter()
        for index in range(arguments.micro_batches):
            if world > 1:
                model.set_requires_gradient_sync(index == arguments.micro_batches - 1)
            tokens = torch.randint(0, shape["vocab"], (arguments.micro_batch, arguments.seq + 1), device=device)
            loss = loss_function(tokens[:, :-1], tokens[:, 1:].contiguous(), cos, sin) / arguments.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step = sorted(times[arguments.warm :])[arguments.steps // 2]
    if rank == 0:
        tokens_a_second = arguments.micro_batch * arguments.micro_batches * arguments.seq / step
        row = {
            "name": arguments.name,
            "devices": world,
            "step_ms": round(step * 1e3, 1),
            "tokens_per_second_per_device": round(tokens_a_second),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
            "loss_last": round(loss.item() * arguments.micro_batches, 4),
        }
        print("RESULT", json.dumps(row), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
