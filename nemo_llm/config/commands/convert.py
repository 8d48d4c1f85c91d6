"""Configuration of ``tools/convert_checkpoint.py`` and ``tools/import_config.py``; defaults stand in ``conf/``."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.fields import PathStr, PositiveFloat, PositiveInt, Section

Format = Literal["hf", "nemo_llm", "megatron", "peft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig(Section):
    """One conversion."""

    source_format: Format
    target_format: Format
    input: PathStr
    output: PathStr
    overwrite: bool
    allow_pickle: bool
    dtype: Literal["fp32", "bf16", "fp16"] | None
    verify: bool
    verify_tokens: PositiveInt
    verify_layers: PositiveInt | None
    tolerance: PositiveFloat
    layer_by_layer: bool
    max_shard_mib: PositiveInt
    family: str | None
    tokenizer: PathStr | None
    base: PathStr | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig(Section):
    """One file of another project's configuration."""

    input: PathStr
    output: PathStr
    name: str | None
    format: Literal["auto", "nemo", "megatron"]
    overwrite: bool
    allow_unmapped: bool
