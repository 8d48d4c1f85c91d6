"""Talk to a trained model in the terminal: ``python -m nemo_llm.chat checkpoint=runs/mine``.

All keys with their defaults: conf/chat.yaml.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

from nemo_llm.config.commands.entry import run_tool
from nemo_llm.config.commands.generate import ChatConfig
from nemo_llm.errors import InputError
from nemo_llm.log import configure_logging, is_first_rank, launched_world_size

_END, _RESET = "/quit", "/reset"


def main(cfg: ChatConfig) -> None:
    """Load the model; then answer line after line until the input ends."""
    configure_logging()
    # Megatron says at every start what is not installed.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from nemo_llm.inference.conversation import Conversation
    from nemo_llm.inference.loaded_model import load_model, open_checkpoint
    from nemo_llm.inference.prompts import load_chat_prompts
    from nemo_llm.parallel.runtime import start_runtime, stop_runtime

    opened = open_checkpoint(cfg, Path(cfg.checkpoint).expanduser(), launched_world_size())
    prompts = load_chat_prompts(opened.tokenizer, opened.folder / "tokenizer", cfg.chat_template)
    runtime = start_runtime(opened.runtime)
    try:
        model = load_model(opened, runtime, cfg.verify)
        conversation = Conversation(model, prompts, cfg.sampling, cfg.system)
        if is_first_rank() and sys.stdin.isatty():
            print(f"{opened.setting.model.name}: {_RESET} forgets the conversation, {_END} ends it")
        while (text := agree(read_line(), runtime.world_size)) is not None:
            if text == _RESET:
                conversation.reset()
            elif text:
                answer(conversation, text)
    finally:
        stop_runtime()


def answer(conversation: Any, text: str) -> None:
    """Print the model's answer as it comes; a message that is too long is said and forgotten."""
    speak = (lambda piece: print(piece, end="", flush=True)) if is_first_rank() else (lambda _piece: None)
    try:
        conversation.answer(text, speak)
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
    sys.exit(run_tool("chat", ChatConfig, main))
