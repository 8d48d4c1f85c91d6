"""Talk to a trained model in the terminal: ``python -m nemo_llm.chat checkpoint=runs/mine``.

All keys with their defaults: conf/chat.yaml.
"""

import sys
from pathlib import Path
from typing import Any

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.generate import ChatToolConfig, SamplingConfig
from nemo_llm.errors import InputError
from nemo_llm.log import is_first_rank, launched_world_size

_END, _RESET = "/quit", "/reset"


def main(cfg: ChatToolConfig) -> None:
    """Load the model; then answer line after line until the input ends."""
    from nemo_llm.conversation.prompts import ChatHistory, load_chat_prompts
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.parallel.runtime import own_runtime

    opened = open_checkpoint(cfg, Path(cfg.checkpoint).expanduser(), launched_world_size())
    prompts = load_chat_prompts(opened.tokenizer, cfg.chat_template)
    with own_runtime(opened.runtime) as runtime:
        model = load_model(opened, runtime, cfg.verify)
        history = ChatHistory(prompts, model.max_length, cfg.sampling.max_new_tokens, cfg.system)
        if is_first_rank() and sys.stdin.isatty():
            print(f"{opened.setting.model.name}: {_RESET} forgets the conversation, {_END} ends it")
        while (text := agree(read_line(), runtime.world_size)) is not None:
            if text == _RESET:
                history.reset()
            elif text:
                answer(model, history, cfg.sampling, text)


def answer(model: Any, history: Any, sampling: SamplingConfig, text: str) -> None:
    """Print the model's answer as it comes; for a message that does not fit the window, print why, and drop it."""
    from nemo_llm.inference.decoder import generate

    speak = (lambda piece: print(piece, end="", flush=True)) if is_first_rank() else (lambda _piece: None)
    try:
        ids = history.ask(text)
        (result,) = generate(model, [ids], sampling, 1, lambda _, piece: speak(piece), history.prompts.template)
        history.answer(result.text)
    except InputError as error:
        speak(f"error: {error}")
    speak("\n")


def read_line() -> str | None:
    """The next message on the first rank; None at the end of the input (and on all other ranks)."""
    if not is_first_rank():
        return None
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line == _END else line


def agree(line: str | None, world_size: int) -> str | None:
    """What the first rank read, on every rank."""
    if world_size == 1:
        return line
    import torch.distributed as dist

    shared = [line]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


if __name__ == "__main__":
    sys.exit(run_tool("chat", ChatToolConfig, main))
