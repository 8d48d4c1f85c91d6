"""Continue text with a trained model: ``python -m nemo_llm.generate checkpoint=runs/mine text="Once upon a time"``.

All keys with their defaults: conf/generate.yaml.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.generate import GenerateConfig
from nemo_llm.errors import InputError
from nemo_llm.log import configure_logging, is_first_rank, launched_world_size


def main(cfg: GenerateConfig) -> None:
    """Load the model, continue every prompt, print or write what came."""
    configure_logging()
    # Megatron says at every start what is not installed.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.inference.prompts import read_prompts

    if cfg.text_file is not None:
        texts = read_prompts(Path(cfg.text_file).expanduser())
    else:
        texts = [cfg.text] if isinstance(cfg.text, str) else list(cfg.text or [])
    opened = open_checkpoint(cfg, Path(cfg.checkpoint).expanduser(), launched_world_size())
    prompts = encode(cfg, opened, texts)

    from nemo_llm.inference.decoder import check_prompts, generate
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    check_prompts(prompts, cfg.sampling.max_new_tokens, opened.setting.model.max_position_embeddings)
    streaming = cfg.stream and len(texts) == 1 and is_first_rank()
    runtime = start_runtime(opened.runtime)
    try:
        model = load_model(opened, runtime, cfg.verify)
        if streaming:
            print("" if cfg.chat else texts[0], end="", flush=True)
        on_text = (lambda _, piece: print(piece, end="", flush=True)) if streaming else None
        results = generate(model, prompts, cfg.sampling, cfg.batch_size, on_text)
    finally:
        stop_runtime()
    if streaming:
        print()
    if not is_first_rank():
        return
    rows = [
        {"prompt": text, "text": result.text, "finish_reason": result.finish_reason, "tokens": result.tokens}
        for text, result in zip(texts, results, strict=True)
    ]
    if not streaming:
        for row in rows:
            print(row["prompt"], row["text"], sep="\n" if cfg.chat else "", end="\n\n")
    if cfg.output is not None:
        write_rows(Path(cfg.output).expanduser(), rows)


def encode(cfg: GenerateConfig, opened: Any, texts: list[str]) -> list[list[int]]:
    """Ids of every prompt, through the chat template where that is asked for."""
    from nemo_llm.inference.prompts import encode_prompt, load_chat_prompts

    if not cfg.chat:
        return [encode_prompt(opened.tokenizer, text) for text in texts]
    prompts = load_chat_prompts(opened.tokenizer, opened.folder / "tokenizer", cfg.chat_template)
    return [prompts.encode([{"role": "user", "content": text}]) for text in texts]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines; the folder is made where it is missing.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(f"output={path}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    sys.exit(run_tool("generate", GenerateConfig, main))
