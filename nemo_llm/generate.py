"""Continue text with a trained model: ``python -m nemo_llm.generate checkpoint=runs/mine text="Once upon a time"``.

All keys with their defaults: conf/generate.yaml.
"""

import json
import sys
from pathlib import Path
from typing import Any

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.generate import GenerateConfig
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.log import is_first_rank, launched_world_size
from nemo_llm.storage.atomic_files import write_output


def main(cfg: GenerateConfig) -> None:
    """Load the model, continue every prompt, print or write what came."""
    from nemo_llm.conversation.prompts import read_prompts
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint

    if cfg.text_file is not None:
        texts = read_prompts(cfg.text_file)
    else:
        texts = [cfg.text] if isinstance(cfg.text, str) else list(cfg.text or [])
    opened = open_checkpoint(cfg, Path(cfg.checkpoint).expanduser(), launched_world_size())
    prompts, template = encode(cfg, opened, texts)

    from nemo_llm.inference.decoder import check_prompts, generate
    from nemo_llm.parallel.runtime import own_runtime

    check_prompts(prompts, cfg.sampling.max_new_tokens, opened.setting.model.max_position_embeddings)
    streaming = cfg.stream and len(texts) == 1 and is_first_rank()
    with own_runtime(opened.runtime) as runtime:
        model = load_model(opened, runtime, cfg.verify)
        if streaming:
            print("" if cfg.chat else texts[0], end="", flush=True)
        on_text = (lambda _, piece: print(piece, end="", flush=True)) if streaming else None
        results = generate(model, prompts, cfg.sampling, cfg.batch_size, on_text, template)
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
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_output("output", Path(cfg.output).expanduser(), lines)


def encode(cfg: GenerateConfig, opened: Any, texts: list[str]) -> tuple[list[list[int]], Any]:
    """Ids of every prompt, and the chat template that they were put into; None where none is asked for.

    Raises:
        ConfigError: a chat template for prompts that are put into none, or one that there is not.
    """
    from nemo_llm.conversation.prompts import encode_prompt, load_chat_prompts

    if not cfg.chat:
        if cfg.chat_template is not None:
            rule = "has no effect: prompts are put into a chat template with chat=true alone"
            raise ConfigError([Problem("chat_template", cfg.chat_template, rule, "add chat=true")])
        return [encode_prompt(opened.tokenizer, text) for text in texts], None
    prompts = load_chat_prompts(opened.tokenizer, cfg.chat_template)
    return [prompts.encode([{"role": "user", "content": text}]) for text in texts], prompts.template


if __name__ == "__main__":
    sys.exit(run_tool("generate", GenerateConfig, main))
