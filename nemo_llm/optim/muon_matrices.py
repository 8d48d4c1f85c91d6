"""Which weights of Megatron's model are matrices that Muon updates, and where this rank's pieces of them lie."""

import re
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_llm.config import ModelConfig, RunConfig
from nemo_llm.megatron.optimizer import owned_ranges, updates_experts
from nemo_llm.models.transformer_config import DTYPES
from nemo_llm.optim.muon import GroupPlace, Matrix, Piece
from nemo_llm.parallel.runtime import ParallelRuntime

_WEIGHT = re.compile(r"decoder\.layers\.\d+\..*\.weight\d*$")
_QKV, _FC1 = re.compile(r"\.linear_qkv\.weight$"), re.compile(r"\.linear_fc1\.weight\d*$")


def connect_muon(cfg: RunConfig, part: Any, model: list[DistributedDataParallel], runtime: ParallelRuntime) -> None:
    """Tell a Megatron optimizer's `Muon` its matrices: those of the layers, without routers; a collective.

    Args:
        part: Megatron's optimizer of dense weights or of experts.
    """
    assert cfg.optim.muon is not None
    experts = updates_experts(part)
    weights = [
        (name, parameter)
        for chunk in model
        for name, parameter in chunk.named_parameters()
        if _is_matrix(name, parameter) and experts == (not getattr(parameter, "allreduce", True))
    ]
    groups = runtime.groups
    sharded = isinstance(part, DistributedOptimizer)
    tp = groups.expt_tp if experts else groups.tp
    # Experts are not split (config/checks/recipe.py), so that data-parallel ranks are all that share them.
    group = (groups.expt_dp if experts else groups.tp_dp_cp) if sharded else tp
    dtype = torch.float32 if cfg.precision.params_dtype == "fp32" else DTYPES["bf16"]
    place = GroupPlace(group, tp.rank(), tp.size(), dtype)
    matrices = [_matrix(cfg.model, name, parameter, tp.size()) for name, parameter in weights]
    numbers = {id(parameter): number for number, (_, parameter) in enumerate(weights)}
    pieces = {
        main: Piece(numbers[id(parameter)], tp.rank(), start, main.numel())
        for parameter, start, main in owned_ranges(part)
        if id(parameter) in numbers and main.numel() > 0
    }
    part.optimizer.connect(cfg.optim.muon, matrices, pieces, place)


def _is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """A router's rows are classes, as those of an output layer are: it is left to AdamW."""
    return (
        parameter.requires_grad and parameter.dim() == 2 and ".router." not in name and _WEIGHT.search(name) is not None
    )


def _matrix(model: ModelConfig, name: str, parameter: torch.nn.Parameter, tp_size: int) -> Matrix:
    rows, columns = parameter.shape
    split = getattr(parameter, "partition_dim", -1) if tp_size > 1 else 0
    inner = (1, 1, rows)
    if _QKV.search(name):
        kinds = model.num_attention_heads // model.num_query_groups + 2
        inner = (rows // (kinds * model.head_dim), kinds, model.head_dim)
    elif _FC1.search(name) and model.gated_linear_unit:
        inner = (1, 2, rows // 2)
    return Matrix(rows, columns, split if split in (0, 1) else None, inner)
