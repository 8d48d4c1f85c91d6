"""LoRA of a Llama-3.1-8B shape on one GPU: our training step beside a compiled model of plain PyTorch, in one run.

``python -m benchmarks.lora_speed [--micro-batch 1] [--micro-batches 1] [--steps 20] [--rank 16] [--only ours|plain] [key=value ...]``.
Random weights and random tokens: nothing is downloaded. Both sides: bf16, sequences of 4,096, adapters on all seven
linear layers, AdamW on the adapters alone. Prints one JSON line a side, beginning with RESULT.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.step_speed import profile

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB = 32, 4096, 14336, 32, 8, 128256


class LoraLinear(nn.Module):
    """A frozen matrix and a low-rank product beside it."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.02, requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(3 * inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b) * self.scale


class Layer(nn.Module):
    """One transformer layer of Llama."""

    def __init__(self, rank: int, sizes: tuple[int, int, int, int]) -> None:
        super().__init__()
        hidden, ffn, self.heads, self.groups = sizes
        head = hidden // self.heads
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(hidden), requires_grad=False) for _ in range(2))
        self.q = LoraLinear(hidden, hidden, rank)
        self.k, self.v = (LoraLinear(hidden, self.groups * head, rank) for _ in range(2))
        self.o = LoraLinear(hidden, hidden, rank)
        self.gate, self.up = (LoraLinear(hidden, ffn, rank) for _ in range(2))
        self.down = LoraLinear(ffn, hidden, rank)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        y = F.rms_norm(x, (hidden,), self.norms[0], 1e-5)
        q, k, v = (f(y).view(batch, length, -1, hidden // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, hidden))
        y = F.rms_norm(x, (hidden,), self.norms[1], 1e-5)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlainLlama(nn.Module):
    """Llama in plain PyTorch, its layers compiled where asked."""

    def __init__(self, rank: int, layers: int, sizes: tuple[int, int, int, int], vocab: int) -> None:
        super().__init__()
        hidden, head = sizes[0], sizes[0] // sizes[2]
        self.embedding = nn.Parameter(torch.randn(vocab, hidden) * 0.02, requires_grad=False)
        self.layers = nn.ModuleList(Layer(rank, sizes) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(hidden), requires_grad=False)
        self.output = nn.Parameter(torch.randn(vocab, hidden) * 0.02, requires_grad=False)
        self.register_buffer("frequencies", 500000.0 ** -(torch.arange(0, head, 2).float() / head), persistent=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.embedding)
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * self.frequencies[None]
        cos, sin = (f(torch.cat((angles, angles), -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(F.rms_norm(x, (x.shape[-1],), self.norm, 1e-5), self.output)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def plain_step(options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one optimizer step of the plain model."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = PlainLlama(options.rank, LAYERS, (HIDDEN, FFN, HEADS, GROUPS), VOCAB)
        torch.set_default_dtype(torch.float32)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    shape = (options.micro_batch, options.seq_length + 1)

    def step() -> float:
        for _ in range(options.micro_batches):
            tokens = torch.randint(0, VOCAB, shape, device="cuda")
            loss = compiled(tokens[:, :-1], tokens[:, 1:]) / options.micro_batches
            loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()) * options.micro_batches

    return step


def our_step(options: argparse.Namespace, overrides: list[str]) -> Callable[[], float]:
    """A function that takes one step of a training run of ours."""
    from nemo_llm.config.checks import check
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime

    cfg = compose(
        [
            "+model=llama3_8b",
            "tokenizer=byte",
            f"model.vocab_size={VOCAB}",
            "model.transformer_impl=torch",
            "precision=bf16",
            "data=mock",
            f"data.seq_length={options.seq_length}",
            f"trainer.micro_batch_size={options.micro_batch}",
            f"trainer.global_batch_size={options.micro_batch * options.micro_batches}",
            "peft=lora",
            f"peft.rank={options.rank}",
            *overrides,
        ]
    )
    check(cfg, 1)
    runtime = start_runtime(cfg.runtime_setting)
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    run = build_training_run(cfg, runtime)
    state = [tensor for part in run.optimizer.param_groups for tensor in part["params"]]
    trained = sum(tensor.numel() for tensor in state)
    print(f"optimizer holds {trained:,} elements of {len(state)} tensors", flush=True)
    return lambda: train_step(run).loss


def measure(name: str, step: Callable[[], float], options: argparse.Namespace) -> None:
    """Warm up, time, print."""
    for _ in range(options.warm):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(options.steps):
        began = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    median = sorted(times)[len(times) // 2]
    figures = {
        "side": name,
        "tokens_per_second": round(options.micro_batch * options.micro_batches * options.seq_length / median),
        "step_ms": round(median * 1e3, 1),
        "slowest_ms": round(max(times) * 1e3, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss_first_last": [round(losses[0], 4), round(losses[-1], 4)],
        "device": torch.cuda.get_device_name(),
    }
    print("RESULT", json.dumps(figures), flush=True)
    if options.profile:
        profile(step)


def main() -> None:
    """Measure both sides one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="kernels of one step by kind")
    parser.add_argument("--only", choices=["ours", "plain"])
    options, overrides = parser.parse_known_args()
    if options.only != "ours":
        measure("plain PyTorch, compiled", plain_step(options), options)
        gc.collect()
        torch.cuda.empty_cache()
    if options.only != "plain":
        measure("nemo_llm", our_step(options, overrides), options)


if __name__ == "__main__":
    sys.exit(main())
