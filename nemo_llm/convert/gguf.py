"""GGUF files, as far as transformers reads them: dequantised into a Hugging Face folder, which is then converted."""

import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nemo_llm.errors import InputError


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the model of a ``.gguf`` file, in float32, and its tokenizer to ``folder``.

    The whole model is in memory at this step.

    Raises:
        InputError: packages that are missing, a file that transformers cannot read.
    """
    try:
        import accelerate
        import gguf
    except ImportError as error:
        raise InputError(
            f"{file}: reading GGUF needs the packages gguf and accelerate (extra `gguf`): {error}"
        ) from None
    del accelerate, gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    # In a folder of its own: what lies beside the file (a config.json that names code) has no say.
    with TemporaryDirectory(dir=folder.parent, prefix=".alone.") as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            read = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(alone, **where)
        except (OSError, ValueError, KeyError, NotImplementedError, struct.error) as error:
            raise InputError(f"{file}: transformers cannot read this GGUF file: {error}") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    # A fresh model: the one that was read refuses to be saved, since it came from quantised weights.
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
