"""Every legal layout of 1, 2 and 4 processes beside one process: ``python -m tests.parity.legal`` writes the table.

What is legal is asked of the checks of the configuration: all combinations of the axes below are made, and those that
pass are layouts. A table is one row a layout: the largest relative difference of loss and of gradient norm in three
steps from those of one process.
"""

import argparse
import functools
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_llm.config.checks import find_problems
from nemo_llm.config.compose.load import compose
from tests.parity.layouts import Layout, model_overrides, train_losses
from tests.parity.run import largest_difference
from tests.ranks import RankPool

STEPS = 3
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5
SEED_VARIABLE = "LAYOUT_SEED"
"""Environment variable that repeats a drawing; without it each run draws anew."""

_SMALL = (
    "data.seq_length=32",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_query_groups=4",
    "optim.lr=3e-3",
    "optim.sched.warmup_steps=1",
)
_SMALL_EXPERTS = (*_SMALL, "model.moe.moe_ffn_hidden_size=32")
MODELS = {
    "dense": ("gpt_tiny", _SMALL),
    "experts": ("moe_tiny", _SMALL_EXPERTS),
    # Latent attention, and beside the experts one that every token goes to, behind a first layer without any.
    "latent attention": (
        "moe_tiny",
        (
            *_SMALL_EXPERTS,
            "model.num_query_groups=8",
            "model.mla={q_lora_rank:24,kv_lora_rank:32,qk_head_dim:16,qk_pos_emb_head_dim:8,v_head_dim:12}",
            "model.moe.moe_first_k_dense_replace=1",
            "model.moe.moe_shared_expert_intermediate_size=32",
        ),
    ),
}

# What each axis is tried at: key of the parallelism section, name in the table, values.
_AXES = (
    ("tensor_model_parallel_size", "TP", (1, 2, 4)),
    ("sequence_parallel", "SP", (False, True)),
    ("expert_tensor_parallel_size", "ETP", (None, 1, 2, 4)),
    ("expert_model_parallel_size", "EP", (1, 2, 4)),
    ("pipeline_model_parallel_size", "PP", (1, 2, 4)),
    ("virtual_pipeline_model_parallel_size", "VPP", (None, 2)),
    ("context_parallel_size", "CP", (1, 2, 4)),
    ("cp_comm_type", "", ("a2a", "all_gather")),
    ("use_distributed_optimizer", "distributed optimizer", (False, True)),
)


@functools.cache
def legal_layouts(model: str) -> tuple[Layout, ...]:
    """Every layout of 1, 2 and 4 processes that the checks let this model of `MODELS` have."""
    name, extra = MODELS[model]
    cfg = compose([*model_overrides(name), "trainer.accelerator=cpu", *extra])
    found = []
    for processes in (1, 2, 4):
        for values in itertools.product(*(values for _, _, values in _AXES)):
            sizes = dict(zip((key for key, _, _ in _AXES), values, strict=True))
            layout = replace(cfg.parallelism, **sizes)
            same_as_null = layout.expert_tensor_parallel_size == layout.tensor_model_parallel_size
            not_read = layout.context_parallel_size == 1 and layout.cp_comm_type != "a2a"
            if same_as_null or not_read or find_problems(replace(cfg, parallelism=layout), processes):
                continue
            overrides = [f"parallelism.{key}={json.dumps(value)}" for key, value in sizes.items()]
            found.append(Layout(_named(sizes, processes), processes, tuple(overrides)))
    return tuple(found)


def _named(sizes: dict, processes: int) -> str:
    words = []
    for key, short, _ in _AXES:
        value = sizes[key]
        if key == "cp_comm_type" and sizes["context_parallel_size"] > 1:
            words.append(value)
        elif value is True:
            words.append(short)
        elif isinstance(value, int) and not isinstance(value, bool) and (value > 1 or short == "ETP"):
            words.append(f"{short}{value}")
    taken = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"] * sizes["context_parallel_size"]
    if processes > taken:
        words.append(f"DP{processes // taken}")
    return " ".join(words) or "one process"


def figures(pool: RankPool, model: str, layout: Layout | None = None) -> list[list[tuple[float, float]]]:
    """Loss and gradient norm of each step, as every rank of this layout (None: one process) has them."""
    name, extra = MODELS[model]
    layout = layout or Layout("one process", 1)
    return pool.run(train_losses, layout.processes, name, (*extra, *layout.overrides), (), STEPS)


def compare(pool: RankPool, model: str, layouts: Sequence[Layout]) -> Iterator[tuple[Layout, float, float]]:
    """(layout, largest relative difference of loss, of gradient norm) over all ranks, for each layout."""
    one = figures(pool, model)[0]
    for layout in layouts:
        loss, norm = map(
            max, zip(*(largest_difference(one, rank) for rank in figures(pool, model, layout)), strict=True)
        )
        yield layout, loss, norm


def drawing_seed() -> int:
    """The seed of this run's drawing: that of `SEED_VARIABLE`, else a new one, which stands there from now on."""
    return int(os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(10**6))))


def drawn_layouts(model: str, count: int) -> list[Layout]:
    """``count`` of the layouts of 2 and 4 processes, by `drawing_seed`."""
    several = [layout for layout in legal_layouts(model) if layout.processes > 1]
    return random.Random(f"{drawing_seed()} {model}").sample(several, len(several))[:count]


def main() -> None:
    """Print a row for every layout, then a summary of each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS))
    parser.add_argument("--reference", type=Path, help="only write the figures of one process to this file")
    parser.add_argument("--count", action="store_true", help="only say how many layouts there are")
    arguments = parser.parse_args()
    models = [arguments.model] if arguments.model else list(MODELS)
    layouts = {model: legal_layouts(model) for model in models}
    if arguments.count:
        print({model: len(found) for model, found in layouts.items()})
        return
    pool = RankPool(4)
    if arguments.reference is not None:
        arguments.reference.write_text(json.dumps({model: figures(pool, model)[0] for model in models}))
        pool.close()
        return
    summary = []
    for model in models:
        began, rows = time.perf_counter(), []
        for layout, loss, norm in compare(pool, model, layouts[model]):
            rows.append((loss, norm))
            print(f"| {model} | {layout.name} | {layout.processes} | {loss:.1e} | {norm:.1e} |", flush=True)
        largest = " | ".join(f"{max(column):.1e}" for column in zip(*rows, strict=True))
        summary.append(f"| {model} | {len(rows)} | {largest} | {time.perf_counter() - began:.0f} s |")
    pool.close()
    print("\n".join(summary))


if __name__ == "__main__":
    main()
