"""From an adapter's checkpoint to one of plain weights, which every other tool reads."""

import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from nemo_llm.checkpoint.fingerprint import weights_fingerprint
from nemo_llm.checkpoint.folder import read_config, resolve_checkpoint, writing
from nemo_llm.checkpoint.weights import save_weights
from nemo_llm.config.compose.load import compose, decode_saved, to_dict
from nemo_llm.errors import InputError
from nemo_llm.models.build import build_model_chunks
from nemo_llm.parallel.runtime import start_runtime, stop_runtime
from nemo_llm.peft.attach import attach_peft
from nemo_llm.peft.merge import merge_adapters
from nemo_llm.peft.state import load_adapter
from nemo_llm.tokenizers.tokenizer import load_tokenizer_from_folder
from nemo_llm.training.resume import load_first_weights


def merge_checkpoint(checkpoint: Path, output: Path) -> Path:
    """Write ``output``, a checkpoint of weights alone that does what base and adapter do together.

    Runs on one process, in fp32 whatever the run trained in; the sum is rounded once, when it is loaded in 16 bits.

    Raises:
        CheckpointError: no adapter there, or other base weights than it was trained on.
        InputError: an adapter that is no change of weights; an output that exists.
    """
    if output.exists():
        raise InputError(f"{output}: exists already; name another folder")
    folder = resolve_checkpoint(checkpoint)
    cfg = decode_saved(read_config(folder))
    if cfg.peft is None:
        raise InputError(f"{folder} was made by a run without peft: there is nothing to merge")
    # Sections of one process in fp32; any model serves to compose them.
    single = compose(["+model=gpt_tiny", "parallelism=single", "precision=fp32", "trainer.accelerator=cpu"])
    trainer = replace(cfg.trainer, accelerator="cpu")
    cfg = replace(cfg, parallelism=single.parallelism, precision=single.precision, trainer=trainer)
    assert cfg.peft is not None
    runtime = start_runtime(cfg)
    try:
        vocab_size = cfg.model.vocab_size or load_tokenizer_from_folder(folder / "tokenizer").vocab_size
        chunks = build_model_chunks(cfg, runtime, vocab_size)
        if cfg.checkpoint.init_from is not None:
            load_first_weights(cfg, runtime, chunks)
        fingerprint = weights_fingerprint(chunks, runtime.device)
        attach_peft(cfg, chunks, runtime)
        load_adapter(chunks, folder, fingerprint)
        merge_adapters(chunks)
        plain = replace(cfg, peft=None, checkpoint=replace(cfg.checkpoint, init_from=None))
        with writing(output) as temporary:
            save_weights(chunks, temporary)
            (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(plain), sort_keys=False), encoding="utf-8")
            shutil.copytree(folder / "tokenizer", temporary / "tokenizer")
    finally:
        stop_runtime()
    return output
