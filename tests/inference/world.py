"""What the tests of generation run on ranks: a small random model as a checkpoint, and texts from it on any layout."""

from pathlib import Path
from typing import Any

# Larger initial weights than in training: with 0.02 a random model hardly looks at its context.
SMALL = [
    "tokenizer=byte",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.max_position_embeddings=128",
    "model.share_embeddings_and_output_weights=false",
    "model.init_method_std=0.2",
    "data.seq_length=128",
    "trainer.accelerator=cpu",
]
PROMPTS = ["Call me Ishmael.", "a", "The whale, the whole whale", "To be or not to be, that is the question:"]


def save_random_model(folder: str, model: str, *overrides: str) -> str:
    """Write a model with random weights as a checkpoint, on one rank; returns its folder."""
    import yaml

    from nemo_llm.checkpoint.folder import writing
    from nemo_llm.checkpoint.weights import save_weights
    from nemo_llm.config.compose.load import compose, to_dict
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.tokenizers.tokenizer import load_tokenizer

    cfg = compose([f"+model={model}", *SMALL, *overrides])
    runtime = start_runtime(cfg.runtime_setting)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    with writing(Path(folder) / "step_00000000") as temporary:
        save_weights(build_model_chunks(cfg.model_setting, runtime, tokenizer.vocab_size), temporary)
        (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
        tokenizer.save(temporary / "tokenizer")
    return folder


def generate_config(folder: str, *overrides: str) -> Any:
    from nemo_llm.config.commands.data import compose_tool
    from nemo_llm.config.commands.generate import GenerateConfig

    return compose_tool(
        "generate", GenerateConfig, [f"checkpoint={folder}", "accelerator=cpu", "text=unused", *overrides]
    )


def load(folder: str, *overrides: str) -> tuple[Any, Any]:
    import torch.distributed as dist

    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.parallel.runtime import start_runtime

    cfg = generate_config(folder, *overrides)
    opened = open_checkpoint(cfg, Path(folder), dist.get_world_size())
    return cfg, load_model(opened, start_runtime(opened.runtime), "full")


def generate_tokens(folder: str, batch_size: int, *overrides: str) -> list[list[int]]:
    """Tokens that follow each of `PROMPTS`."""
    from nemo_llm.inference.decoder import generate

    cfg, model = load(folder, *overrides)
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    return [result.tokens for result in generate(model, prompts, cfg.sampling, batch_size)]


def greedy_without_cache(folder: str, num_tokens: int, *overrides: str) -> list[list[int]]:
    """The likeliest tokens, the whole text computed anew for each, one prompt at a time."""
    import torch

    _, model = load(folder, *overrides)
    results = []
    for text in PROMPTS:
        tokens = model.tokenizer.encode(text)
        start = len(tokens)
        for _ in range(num_tokens):
            with torch.no_grad():
                whole = torch.tensor([tokens])
                logits = model.chunk(whole, torch.arange(len(tokens))[None], attention_mask=None)
            tokens.append(int(logits[0, -1, : model.vocab_size].argmax()))
        results.append(tokens[start:])
    return results


def losses_of_texts(folder: str, *overrides: str) -> list[float]:
    """Losses of the last bytes of each prompt, through `InferenceModel.losses`."""
    import torch

    _, model = load(folder, *overrides)
    texts = [model.tokenizer.encode(text) for text in PROMPTS if len(text) > 4]
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    wanted = torch.tensor(
        [(len(text) - 1 - back) * len(texts) + row for row, text in enumerate(texts) for back in (1, 2)]
    )
    labels = torch.tensor([text[-back] for text in texts for back in (1, 2)])
    return model.losses(tokens, labels, wanted)[0].tolist()


def losses_by_log_softmax(folder: str) -> list[float]:
    """The same by PyTorch's own log-softmax over the logits of each text alone."""
    import torch

    _, model = load(folder)
    found = []
    for text in PROMPTS:
        if len(text) <= 4:
            continue
        tokens = torch.tensor([model.tokenizer.encode(text)])
        with torch.no_grad():
            logits = model.chunk(tokens, torch.arange(tokens.shape[1])[None], attention_mask=None)
        scores = logits[0, :, : model.vocab_size].log_softmax(-1)
        found += [-float(scores[-1 - back, tokens[0, -back]]) for back in (1, 2)]
    return found
