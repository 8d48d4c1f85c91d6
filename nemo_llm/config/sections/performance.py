"""The `performance` section: how the same arithmetic is carried out faster or in less memory."""

from dataclasses import dataclass

from nemo_llm.config.sections.fields import NonNegativeInt, PositiveInt, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceConfig(Section):
    """Optimisations of the torch backend, each a key of its own; none changes what is computed but for rounding."""

    fused_linear_cross_entropy: bool
    cross_entropy_chunk_tokens: PositiveInt
    gradient_accumulation_fusion: bool
    fused_rope: bool
    fused_kernels: bool
    choose_matrix_kernels: bool
    flex_attention: bool
    compile_layers: bool
    ddp_bucket_size: PositiveInt | None
    offload_optimizer_moments: bool
    offload_activation_layers: NonNegativeInt
