"""Weights from one format to another; the output folder appears whole, proven, or not at all."""

from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.convert.hf import hf_to_ours, ours_to_hf
from nemo_llm.convert.megatron import megatron_to_ours, ours_to_megatron
from nemo_llm.convert.write_checkpoint import ConversionOutcome, begin_or_continue, forget_beginning, paths_of
from nemo_llm.errors import InputError

WAYS = {
    ("hf", "nemo_llm"): hf_to_ours,
    ("nemo_llm", "hf"): ours_to_hf,
    ("megatron", "nemo_llm"): megatron_to_ours,
    ("nemo_llm", "megatron"): ours_to_megatron,
}


def convert(cfg: ConvertConfig) -> ConversionOutcome:
    """Convert as asked; the output folder appears when everything in it is written and compared.

    Raises:
        InputError: an input that cannot be converted, an output that exists.
        CheckpointError: a damaged checkpoint, or models whose logits differ.
    """
    source, output = paths_of(cfg)
    way = WAYS.get((cfg.source_format, cfg.target_format))
    if way is None:
        known = ", ".join(f"{first} to {second}" for first, second in WAYS)
        raise InputError(f"{cfg.source_format} to {cfg.target_format}: no such conversion; there are {known}")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = begin_or_continue(cfg, source, output)
    try:
        return way(cfg, source, temporary, output)
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        forget_beginning(output)
