"""Freeze a model and give it the adapters that the `peft` section asks for."""

import fnmatch
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.utils import get_model_config, unwrap_model

from nemo_llm.checkpoint.collective_errors import raise_together
from nemo_llm.config.compose.catalog import nearest
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.peft import LinearMethod, LoraConfig, PromptMethod
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.models.initialize import fill_normal
from nemo_llm.parallel.runtime import ParallelRuntime
from nemo_llm.peft.adapter import Adapter, adapted_modules, adapter_state, heads, put_on_embedding, put_on_linear
from nemo_llm.peft.linear import LinearPart, LinearPlace, find_linears
from nemo_llm.peft.linear_adapter import BottleneckAdapter, Ia3Adapter, LinearAdapter
from nemo_llm.peft.lora import LoraAdapter
from nemo_llm.peft.prompt import PromptAdapter


def attach_peft(setting: ModelSetting, chunks: list[torch.nn.Module], runtime: ParallelRuntime) -> None:
    """Freeze these chunks and put adapters on them, initialised by name as all weights are.

    Must come before Megatron's gradient buffers and the optimizer are made: what is frozen then gets neither gradients
    nor optimizer state nor master weights.

    Raises:
        ConfigError: a pattern that matches nothing, or a layer that an adapter cannot go on.
    """
    assert setting.peft is not None
    for chunk in chunks:
        chunk.requires_grad_(False)
    for head in heads(chunks):  # new, as the adapters are
        head.requires_grad_(True)
    if isinstance(setting.peft, LinearMethod):
        _attach_to_linears(setting.peft, chunks, runtime)
    else:
        _attach_to_embedding(setting.peft, setting.model.hidden_size, chunks, runtime)
    for module in adapted_modules(chunks):
        _initialize(module.adapter, setting.seed)
    for chunk in chunks:
        _let_gradients_begin(chunk)


def count_parameters(chunks: list[torch.nn.Module], runtime: ParallelRuntime) -> int:
    """Trained parameters of the whole model, each counted once; a collective of all ranks."""
    shards = adapter_state(chunks).values()
    trained = sum(shard.data.numel() for shard in shards if is_main_replica(shard.replica_id))
    counts = torch.tensor(trained, dtype=torch.int64, device=runtime.device)
    dist.all_reduce(counts)
    return int(counts.item())


def _attach_to_linears(peft: LinearMethod, chunks: list[torch.nn.Module], runtime: ParallelRuntime) -> None:
    places = []
    for chunk in chunks:
        whole = unwrap_model(chunk)
        places += find_linears(whole, get_model_config(whole), runtime.groups)
    chosen = [(place, _chosen_parts(place, peft.target_modules)) for place in places]
    known: list[list[tuple[str, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(known, [_names(place) for place in places])
    _check_patterns(peft, [name for of_rank in known for names in of_rank for name in names])
    with raise_together():
        for place, parts in chosen:
            if parts:
                put_on_linear(place.linear, _make_adapter(peft, place, parts))


def _make_adapter(peft: LinearMethod, place: LinearPlace, parts: tuple[LinearPart, ...]) -> LinearAdapter:
    if peft.kind == "ia3":
        return Ia3Adapter(place, parts)
    if peft.kind == "adapter":
        if place.column or place.expert:
            problem = Problem(
                "peft.target_modules",
                list(peft.target_modules),
                f"an adapter cannot go behind {place.name}: it follows the end of attention or of a dense MLP",
                "name linear_proj and linear_fc2 (with experts: linear_proj alone)",
            )
            raise ConfigError([problem])
        return BottleneckAdapter(place, peft.bottleneck_size)
    return LoraAdapter(place, peft, {part: _rank_of(peft, place, part) for part in parts})


def _chosen_parts(place: LinearPlace, patterns: Iterable[str]) -> tuple[LinearPart, ...]:
    """Parts that some pattern names, directly or with the whole layer."""
    return tuple(
        part
        for part in place.parts
        if any(_matches(pattern, name) for pattern in patterns for name in (place.name, place.part_name(part)))
    )


def _rank_of(peft: LoraConfig, place: LinearPlace, part: LinearPart) -> int:
    matching = [
        rank
        for pattern, rank in peft.ranks.items()
        if any(_matches(pattern, name) for name in (place.name, place.part_name(part)))
    ]
    return matching[-1] if matching else peft.rank


def _matches(pattern: str, name: str) -> bool:
    """A pattern without dots is held against the last part of the name, any other against the whole."""
    return fnmatch.fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def _names(place: LinearPlace) -> tuple[str, ...]:
    return (place.name, *(place.part_name(part) for part in place.parts))


def _check_patterns(peft: LinearMethod, names: list[str]) -> None:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    problems = []
    ranks = tuple(peft.ranks) if isinstance(peft, LoraConfig) else ()
    for key, patterns in (("peft.target_modules", peft.target_modules), ("peft.ranks", ranks)):
        for pattern in patterns:
            if any(_matches(pattern, name) for name in names):
                continue
            meant = nearest(pattern, names if "." in pattern else leaves)
            fix = f"did you mean {meant}?" if meant else "take one of those"
            rule = f"matches no linear layer; the model has {', '.join(leaves)}, such as {names[0] if names else '-'}"
            problems.append(Problem(key, pattern, rule, fix))
    if not names:
        fix = "set model.transformer_impl=torch"
        problems = [Problem("peft.kind", peft.kind, "works on Megatron's own linear layers; the model has none", fix)]
    if problems:
        raise ConfigError(problems)


def _attach_to_embedding(
    peft: PromptMethod, hidden_size: int, chunks: list[torch.nn.Module], runtime: ParallelRuntime
) -> None:
    size = (peft.encoder_hidden_size or hidden_size) if peft.kind == "p_tuning" else None
    for chunk in chunks:
        whole = unwrap_model(chunk)
        if whole.pre_process:
            embedding = whole.embedding.word_embeddings
            put_on_embedding(embedding, PromptAdapter(embedding, peft.num_virtual_tokens, size, runtime.groups))


@torch.no_grad()
def _initialize(adapter: Adapter, seed: int) -> None:
    assert isinstance(adapter, LinearAdapter | PromptAdapter)
    for name, shard in adapter.shards():
        std = adapter.initial_std(adapter.placements[name])
        if std is not None:
            fill_normal(shard, seed, std)


def _let_gradients_begin(chunk: torch.nn.Module) -> None:
    """Let what the first layer reads require a gradient, as if the embedding were trained.

    A frozen embedding's output needs none. But Megatron's recomputation passes gradients on to the weights inside
    only when an input asks for one, and its pipeline schedule calls backward on what a stage sends.
    """
    whole = unwrap_model(chunk)
    config = get_model_config(whole)
    if whole.pre_process and (config.recompute_granularity is not None or config.pipeline_model_parallel_size > 1):

        def require(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            return output.requires_grad_() if torch.is_grad_enabled() else output

        whole.embedding.register_forward_hook(require)
