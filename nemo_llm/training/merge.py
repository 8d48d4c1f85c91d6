"""From an adapter's checkpoint to one of plain weights, which every other tool reads."""

import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from nemo_llm.checkpoint.folder import read_config, resolve_checkpoint, writing
from nemo_llm.checkpoint.manifest import verify
from nemo_llm.checkpoint.weights import save_weights
from nemo_llm.config.compose.load import decode_saved, to_dict
from nemo_llm.config.shipped import reference_fp32
from nemo_llm.convert.logit_check import saved_model
from nemo_llm.convert.peft_adapters import adapted_model
from nemo_llm.errors import InputError
from nemo_llm.peft.merge import merge_adapters
from nemo_llm.peft.state import load_adapter


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
    base = None if cfg.checkpoint.init_from is None else resolve_checkpoint(Path(cfg.checkpoint.init_from))
    if base is not None:
        verify(base, cfg.checkpoint.verify, (0, 1))
    setting = replace(reference_fp32(saved_model(folder), cfg.peft), seed=cfg.trainer.seed)
    with adapted_model(setting, base, new_head=True) as (chunk, fingerprint):
        load_adapter([chunk], folder, fingerprint)
        merge_adapters([chunk])
        plain = replace(cfg, peft=None, checkpoint=replace(cfg.checkpoint, init_from=None))
        with writing(output) as temporary:
            save_weights([chunk], temporary)
            (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(plain), sort_keys=False), encoding="utf-8")
            shutil.copytree(folder / "tokenizer", temporary / "tokenizer")
    return output
