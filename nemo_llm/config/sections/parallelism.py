"""The `parallelism` section: how a model is laid out over processes."""

from dataclasses import dataclass
from typing import Literal

from nemo_llm.config.sections.fields import PositiveInt, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig(Section):
    """Parallel sizes and the communication and memory choices that go with them, in Megatron's spelling."""

    tensor_model_parallel_size: PositiveInt
    sequence_parallel: bool
    pipeline_model_parallel_size: PositiveInt
    virtual_pipeline_model_parallel_size: PositiveInt | None
    pipeline_model_parallel_layout: str | None
    context_parallel_size: PositiveInt
    cp_comm_type: Literal["a2a", "all_gather", "p2p"]
    expert_model_parallel_size: PositiveInt
    expert_tensor_parallel_size: PositiveInt | None
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    recompute_granularity: Literal["selective", "full"] | None
    recompute_method: Literal["uniform", "block"] | None
    recompute_num_layers: PositiveInt | None
    recompute_modules: list[str]

    @property
    def model_parallel_size(self) -> int:
        """Processes that one copy of the dense model spans: TP x CP x PP."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def expert_tp_size(self) -> int:
        """Processes that one expert is split over: ETP, or TP where that is not set."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size
