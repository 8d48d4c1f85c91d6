"""The peer for shapes that `transformers` has: its own model, compiled, with its grouped products for experts.

``python -m benchmarks.peer_transformers --micro-batch 2 --micro-batches 2 [--eager] +model=qwen3_30b_a3b model.num_layers=6``: the shape of any
configuration of ours that can be exported. Weights, gradients and AdamW's moments in bf16, which is less to read and write than our fp32 state: in
the peer's favour. Random tokens, router losses left out. Prints one JSON line beginning with RESULT, in the terms of step_speed.
"""

import argparse
import json
import time

import torch


def main() -> None:
    """Build the model, warm up, time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--name", default="peer", help="of the row, which benchmarks.gpu_table gives")
    arguments, overrides = parser.parse_known_args()

    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_llm.config.compose.load import compose, to_dict
    from nemo_llm.families.registry import family_for, hf_config

    cfg = compose(overrides)
    section = to_dict(cfg)["model"]
    settings = hf_config(family_for(section), section)
    settings |= {
        "vocab_size": cfg.model.vocab_size or settings["vocab_size"],
        "use_cache": False,
        "output_router_logits": False,
    }
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    if cfg.model.moe is not None:
        model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    loss_of = loss_of if arguments.eager else torch.compile(loss_of)
    shape = (arguments.micro_batch, cfg.data.seq_length)
    times = []
    for _ in range(arguments.warm + arguments.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(arguments.micro_batches):
            (loss_of(torch.randint(0, config.vocab_size, shape, device="cuda")) / arguments.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = sorted(times[arguments.warm :])[arguments.steps // 2]
    tokens = arguments.micro_batch * arguments.micro_batches * cfg.data.seq_length
    figures = {
        "name": f"transformers {cfg.model.name} x{cfg.model.num_layers} {'eager' if arguments.eager else 'compiled'}",
        "tokens_per_second": round(tokens / seconds),
        "step_ms": round(seconds * 1e3, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }
    print("RESULT", json.dumps(figures))


if __name__ == "__main__":
    main()
