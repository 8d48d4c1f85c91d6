"""Generation on one GPU beside ``transformers.generate`` (static cache, compiled), random weights of a 1B shape.

    python -m benchmarks.generation_speed [--rows 64] [--prompt 512] [--new 512] [--model llama3_1b]

Both run the same shape in bf16, greedy, without an end-of-text token. The bound is what the memory bandwidth allows: at each
step all weights and the keys and values so far are read once. Prints one row a way: tokens/s, share of the bound, time
to the first token. Nothing is downloaded. ``--bandwidth`` is the card's, in GB/s (H100 SXM: 3350, H200: 4800).
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch


def bound_seconds(weights: int, cache_bytes_a_token: int, rows: int, prompt: int, new: int, bandwidth: float) -> float:
    """Seconds that reading alone takes: weights once a step, each row's keys and values so far."""
    read = sum(weights + rows * (prompt + step) * cache_bytes_a_token for step in range(1, new))
    return read / (bandwidth * 1e9)


def save_checkpoint(folder: Path, model: str) -> None:
    import yaml

    from nemo_llm.checkpoint.folder import writing
    from nemo_llm.checkpoint.weights import save_weights
    from nemo_llm.config.compose.load import compose, to_dict
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime
    from nemo_llm.tokenizers.tokenizer import load_tokenizer

    # Llama 3's stretched wavelengths cost nothing at a step; transformers' name for them needs no match here.
    cfg = compose([f"+model={model}", "precision=bf16", "model.transformer_impl=torch", "exp_manager.enabled=false"])
    runtime = start_runtime(cfg.runtime_setting)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    with writing(folder / "step_00000000") as temporary:
        save_weights(
            build_model_chunks(cfg.model_setting, runtime, cfg.model.vocab_size or tokenizer.vocab_size), temporary
        )
        (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
        tokenizer.save(temporary / "tokenizer")
    stop_runtime()


def run_ours(folder: Path, rows: int, prompt: int, new: int) -> dict:
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.generate import GenerateConfig
    from nemo_llm.inference.decoder import generate
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    def settings(count: int):
        keys = [f"sampling.max_new_tokens={count}", "sampling.ignore_eod=true", "text=unused", f"checkpoint={folder}"]
        return compose_tool("generate", GenerateConfig, keys)

    cfg = settings(new)
    opened = open_checkpoint(cfg, folder, 1)
    model = load_model(opened, start_runtime(opened.runtime), "sizes")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 50000, (rows, prompt), generator=generator).tolist()
    weights = sum(p.numel() * p.element_size() for p in model.chunk.parameters())
    found: dict = {"weights": weights}
    generate(model, prompts, cfg.sampling, rows)  # compiles
    for name, sampling in (("first", settings(1).sampling), ("all", cfg.sampling)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        results = generate(model, prompts, sampling, rows)
        torch.cuda.synchronize()
        found[name] = time.perf_counter() - began
    assert all(len(result.tokens) == new for result in results)
    found["graphs"] = model.records_graphs
    found["model"] = opened.setting.model
    stop_runtime()
    return found


def run_theirs(shape, rows: int, prompt: int, new: int) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.share_embeddings_and_output_weights,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50000, (rows, prompt), generator=generator).cuda()
    mask = torch.ones_like(ids)

    def generate(count: int):
        with torch.no_grad():
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False, cache_implementation="static"
            )

    found = {}
    for count in (new, new):  # the first compiles (transformers compiles decoding itself with a static cache)
        torch.cuda.synchronize()
        began = time.perf_counter()
        output = generate(count)
        torch.cuda.synchronize()
        found["all"] = time.perf_counter() - began
    assert output.shape[1] == prompt + new
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        generate(1)
        torch.cuda.synchronize()
        found["first"] = time.perf_counter() - began
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--model", default="llama3_1b")
    parser.add_argument("--bandwidth", type=float, default=3350.0)
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    rows, prompt, new = arguments.rows, arguments.prompt, arguments.new
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), arguments.model)
        ours = run_ours(Path(folder), rows, prompt, new)
    shape = ours["model"]
    a_token = 2 * shape.num_layers * shape.num_query_groups * shape.head_dim * 2
    bound = bound_seconds(ours["weights"], a_token, rows, prompt, new, arguments.bandwidth)
    found = {"ours": ours}
    if not arguments.ours_only:
        found["transformers"] = run_theirs(shape, rows, prompt, new)
    print(
        f"{torch.cuda.get_device_name()}, {arguments.model}, {rows} x ({prompt} + {new}), torch {torch.__version__}, bound of decoding {bound:.2f} s"
    )
    print("| way | tokens/s | decoding ms/step | share of the bandwidth bound (decoding) | time to first token |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        decoding = row["all"] - row["first"]
        print(
            f"| {name} | {rows * new / row['all']:,.0f} | {decoding / (new - 1) * 1000:.2f} | {bound / decoding:.1%} | {row['first']:.3f} s |"
        )
    print(
        json.dumps(
            {name: {"all": row["all"], "first": row["first"]} for name, row in found.items()}
            | {"graphs": ours["graphs"]}
        )
    )


if __name__ == "__main__":
    main()
