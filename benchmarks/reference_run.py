"""Does a whole pretraining run go as plain PyTorch's does? The same initial weights, batches and recipe, both to the end.

First train as a user does, with ``trainer.log_interval=1``, then train the plain model on what that run was given:

``python -m nemo_llm.train +model=gpt_126m run.dir=runs/ours trainer.log_interval=1 ...``
``python -m benchmarks.reference_run --ours runs/ours --save runs/plain``

Model, loss, clipping, AdamW with its groups, warm-up and cosine are written here anew, from the GPT-2 and
AdamW papers; only the configuration, the batches and the initial weights are taken from the package. Prints how far the two loss curves are apart by
windows, and saves the plain weights as a checkpoint, so that ``python -m nemo_llm.evaluate`` measures both.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class ReferenceBlock(nn.Module):
    """One pre-norm GPT-2 layer."""

    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(hidden, hidden), nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        q, k, v = (
            linear(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 (Radford et al., 2019) with tied embeddings."""

    def __init__(self, model, vocab_rows: int) -> None:
        super().__init__()
        self.vocab_size = model.vocab_size  # the other rows only fill the table
        self.tokens = nn.Embedding(vocab_rows, model.hidden_size)
        self.positions = nn.Embedding(model.max_position_embeddings, model.hidden_size)
        self.blocks = nn.ModuleList(
            ReferenceBlock(model.hidden_size, model.num_attention_heads, model.ffn_hidden_size)
            for _ in range(model.num_layers)
        )
        self.norm = nn.LayerNorm(model.hidden_size)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the losses of tokens [b, s] against labels [b, s], each times its weight [b, s]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight[: self.vocab_size].T
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return (losses * weights.flatten()).sum()


def pairs(plain: PlainGPT, theirs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter of the plain model, the view of the package's that holds the same numbers)."""
    found = [
        (plain.tokens.weight, theirs["embedding.word_embeddings.weight"]),
        (plain.positions.weight, theirs["embedding.position_embeddings.weight"]),
        (plain.norm.weight, theirs["decoder.final_layernorm.weight"]),
        (plain.norm.bias, theirs["decoder.final_layernorm.bias"]),
    ]
    names = {
        "norm1": "input_layernorm", "norm2": "pre_mlp_layernorm", "out": "self_attention.linear_proj",
        "up": "mlp.linear_fc1", "down": "mlp.linear_fc2",
    }  # fmt: skip
    for number, block in enumerate(plain.blocks):
        for kind in ("weight", "bias"):
            layer = f"decoder.layers.{number}."
            found += [
                (getattr(getattr(block, own), kind), theirs[f"{layer}{name}.{kind}"]) for own, name in names.items()
            ]
            # Megatron keeps query, key and value of one head together.
            stacked = theirs[f"{layer}self_attention.linear_qkv.{kind}"].unflatten(0, (block.heads, 3, -1))
            for place, linear in enumerate((block.q, block.k, block.v)):
                parameter = getattr(linear, kind)
                found.append((parameter.unflatten(0, (block.heads, -1)), stacked[:, place]))
    return found


def rate(step: int, optim) -> float:
    """Linear warm-up to the peak at ``warmup_steps``, then half a cosine to ``min_lr`` at ``decay_steps``."""
    sched = optim.sched
    if step <= sched.warmup_steps:
        return optim.lr * step / sched.warmup_steps
    done = (step - sched.warmup_steps) / (sched.decay_steps - sched.warmup_steps)
    return sched.min_lr + (optim.lr - sched.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def train_plain(run, plain: PlainGPT, compiled: bool) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    cfg, device = run.cfg, run.runtime.device
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    vectors = [p for p in plain.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(cfg.optim.adam_beta1, cfg.optim.adam_beta2), eps=cfg.optim.adam_eps, fused=True,
    )  # fmt: skip
    loss_of = torch.compile(plain) if compiled else plain
    amp = cfg.precision.params_dtype == "bf16"
    rows = []
    began = time.perf_counter()
    samples = cfg.trainer.global_batch_size
    for step in range(1, cfg.trainer.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, cfg.optim)
        batches = run.loader.micro_batches((step - 1) * samples, samples)
        count = sum(batch["loss_mask"].sum() for batch in batches)
        total = torch.zeros((), device=device)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = loss_of(batch["tokens"], batch["labels"], batch["loss_mask"]) / count
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), cfg.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append((total.item(), norm.item()))
        if step % 50 == 0:
            speed = step * samples * cfg.data.seq_length / (time.perf_counter() - began)
            print(f"step {step}: loss {rows[-1][0]:.4f}, {speed:,.0f} tokens/s", flush=True)
    return rows


def compare(ours: list[tuple[float, float]], plain: list[tuple[float, float]], windows: int = 8) -> str:
    """Mean losses by windows and their differences, and the same of the gradient norms."""
    lines = ["| steps | loss, ours | loss, plain | difference | mean of the steps' | gradient norm, ours | plain |", "|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    size = -(-len(plain) // windows)
    for first in range(0, len(plain), size):
        one, other = ours[first : first + size], plain[first : first + size]
        a, b = sum(loss for loss, _ in one) / len(one), sum(loss for loss, _ in other) / len(other)
        apart = sum(abs(x[0] - y[0]) / y[0] for x, y in zip(one, other, strict=True)) / len(one)
        norms = [sum(norm for _, norm in rows) / len(rows) for rows in (one, other)]
        lines.append(
            f"| {first + 1} to {first + len(one)} | {a:.4f} | {b:.4f} | {a / b - 1:+.3%} | {apart:.3%} | {norms[0]:.4f} | {norms[1]:.4f} |"
        )
    first = abs(ours[0][0] - plain[0][0]) / plain[0][0]
    return "\n".join([*lines, f"first step: losses differ by {first:.1e}"])


def main() -> int:
    """Train the plain model, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=Path, required=True, help="folder of the finished run")
    parser.add_argument("--save", type=Path, required=True, help="folder for the plain model's checkpoint")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    arguments = parser.parse_args()

    from nemo_llm.checkpoint.saved_run import SavedRun
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    cfg = SavedRun.at(arguments.ours).sections
    log = [json.loads(line) for line in (arguments.ours / "metrics.jsonl").read_text().splitlines()]
    ours = [(row["loss"], row["grad_norm"]) for row in log if "loss" in row]
    if len(ours) != cfg.trainer.max_steps:
        print(f"{arguments.ours} has {len(ours)} losses of {cfg.trainer.max_steps} steps: train it to its end with trainer.log_interval=1")  # fmt: skip
        return 2
    runtime = start_runtime(cfg.runtime_setting)
    from nemo_llm.training.checkpoint import CheckpointSaver
    from nemo_llm.training.setup import build_training_run

    run = build_training_run(cfg, runtime)
    theirs = {name.removeprefix("module."): p.detach() for name, p in run.model[0].module.named_parameters()}
    plain = PlainGPT(cfg.model, len(theirs["embedding.word_embeddings.weight"])).to(runtime.device)
    with torch.no_grad():
        for own, their in pairs(plain, theirs):
            own.copy_(their)
    rows = train_plain(run, plain, arguments.compiled)
    with torch.no_grad():
        for own, their in pairs(plain, theirs):
            their.copy_(own)
    run.optimizer.reload_model_params()
    run.state.step = cfg.trainer.max_steps
    run.run_dir = arguments.save
    arguments.save.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.ours / "config.yaml", arguments.save / "config.yaml")
    saved = CheckpointSaver(run).save(run, in_background=False)
    print(f"{compare(ours, rows)}\nplain weights: {saved}")
    stop_runtime()
    return 0


if __name__ == "__main__":
    sys.exit(main())
