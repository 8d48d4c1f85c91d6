"""The table of one host with four or eight GPUs: scaling, large shapes, layouts beside one GPU, a planner's calibration.

``python -m benchmarks.many_gpus [--rows NAME ...] [--list] [--out FILE]`` works as `benchmarks.gpu_table` does: it goes on
where it was stopped. Rows of the group "parity" leave their losses in ``parity_losses/``; ``--parity`` compares what lies
there with the row of one GPU. Checkpoints on eight GPUs: ``benchmarks.checkpoint_stall`` under torchrun.
"""

import json
import sys
from itertools import product
from pathlib import Path

from benchmarks.gpu_table import FULL, OURS, SpeedRow, main

LOSSES = Path("parity_losses")
SHARDED = [
    "model.transformer_impl=torch", "parallelism.use_distributed_optimizer=true", "parallelism.overlap_grad_reduce=true",
    "parallelism.overlap_param_gather=true",
]  # fmt: skip
SIZES = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
SIZES |= {"ep": "expert_model_parallel_size", "etp": "expert_tensor_parallel_size"}
FOUR_LAYERS = ["+model=llama3_8b", "model.num_layers=4", "trainer.global_batch_size=16", "trainer.micro_batch_size=1"]
EXPERTS = [
    "+model=mixtral_8x7b", "model.num_layers=4", "model.hidden_size=2048", "model.ffn_hidden_size=7168",
    "model.moe.moe_ffn_hidden_size=7168", "model.vocab_size=50304", "trainer.global_batch_size=16", "trainer.micro_batch_size=1",
]  # fmt: skip
FINE_EXPERTS = [
    "+model=qwen3_30b_a3b",
    "model.num_layers=4",
    "trainer.global_batch_size=16",
    "trainer.micro_batch_size=1",
]


def layout(**sizes: int) -> list[str]:
    """Overrides of a layout; tensor parallelism splits the sequence too."""
    sequence = ["parallelism.sequence_parallel=true"] if sizes.get("tp", 1) > 1 else []
    return [f"parallelism.{SIZES[axis]}={size}" for axis, size in sizes.items()] + sequence


def scaling() -> dict[str, SpeedRow]:
    """Weak and strong scaling of the 1B shape, weak scaling of the 8B shape, data parallel."""
    rows = {}
    small = [*OURS, "+model=llama3_1b", "trainer.micro_batch_size=8", *SHARDED]
    large = [*OURS, "+model=llama3_8b", "trainer.micro_batch_size=1", *SHARDED]
    for gpus in (1, 2, 4, 8):
        weak, strong = f"trainer.global_batch_size={16 * gpus}", "trainer.global_batch_size=64"
        rows[f"1b weak {gpus}"] = SpeedRow([*small, weak], gpus, "1b weak 1")
        rows[f"1b strong {gpus}"] = SpeedRow([*small, strong], gpus, "1b strong 1")
        if gpus > 1:
            rows[f"8b weak {gpus}"] = SpeedRow([*large, f"trainer.global_batch_size={8 * gpus}"], gpus, "8b weak 2")
    return rows


def large() -> dict[str, SpeedRow]:
    """The 8B shape at 8192 tokens on eight GPUs, and as many layers of the 70B shape as 80 GB hold (24 of 80)."""
    eight = [
        *OURS,
        "+model=llama3_8b",
        "data.seq_length=8192",
        "trainer.micro_batch_size=1",
        "trainer.global_batch_size=32",
    ]
    seventy = [*OURS, "+model=llama3_70b", "model.num_layers=24", "trainer.micro_batch_size=1", *SHARDED, *FULL]
    return {
        "8b 8192 bf16": SpeedRow([*eight, *SHARDED], 8),
        "8b 8192 fp8": SpeedRow([*eight, *SHARDED, "precision=fp8_tensorwise"], 8, "8b 8192 bf16"),
        "70b x24 tp8": SpeedRow([*seventy, *layout(tp=8), "trainer.global_batch_size=16"], 8),
        "70b x24 tp4 pp2": SpeedRow([*seventy, *layout(tp=4, pp=2), "trainer.global_batch_size=16"], 8, "70b x24 tp8"),
    }


def parity() -> dict[str, SpeedRow]:
    """Fifty steps of each layout of eight, and of one GPU: 4 layers of the 8B shape, a Mixtral-like and a fine-grained MoE."""
    groups = {
        "dense": (FOUR_LAYERS, {"tp8": {"tp": 8}, "tp4 pp2": {"tp": 4, "pp": 2}, "tp2 pp2 cp2": {"tp": 2, "pp": 2, "cp": 2}}),
        "moe": (EXPERTS, {"ep8": {"ep": 8}}),
        "fine moe": (FINE_EXPERTS, {"ep8": {"ep": 8}}),
    }  # fmt: skip
    rows = {}
    for group, (model, layouts) in groups.items():
        for name, sizes in {"one GPU": {}, **layouts}.items():
            command = [*OURS, *model, *SHARDED, *layout(**sizes), "--warm", "5", "--steps", "45"]
            row = f"parity {group} {name}"
            rows[row] = SpeedRow(
                [*command, "--losses", str(LOSSES / f"{row}.json")], 8 if sizes else 1, f"parity {group} one GPU"
            )
    long = [*OURS, "+model=llama3_1b", "data.seq_length=131072", "data.split=null", *SHARDED, *FULL, *layout(cp=8)]
    rows["1b 128k cp8"] = SpeedRow([*long, "trainer.micro_batch_size=1", "trainer.global_batch_size=2"], 8)
    return rows


def layouts_of_8b() -> dict[str, SpeedRow]:
    """Every layout of eight GPUs of the 8B shape at a global batch of 128, without and with full recomputation."""
    rows = {}
    for tp, pp, cp in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2)):
        if tp * pp * cp > 8:
            continue
        for recompute in ([], FULL):
            name = f"8b tp{tp} pp{pp} cp{cp}" + (" full recompute" if recompute else "")
            batch = ["trainer.micro_batch_size=1", "trainer.global_batch_size=128", "--warm", "2", "--steps", "4"]
            command = [*OURS, "+model=llama3_8b", *SHARDED, *layout(tp=tp, pp=pp, cp=cp), *recompute, *batch]
            rows[name] = SpeedRow(command, 8)
    return rows


ROWS = {**scaling(), **large(), **parity(), **layouts_of_8b()}


def compare_losses() -> None:
    """Largest and mean relative difference of each layout's losses from those of one GPU."""
    for path in sorted(LOSSES.glob("*.json")):
        alone = path.with_name(f"{ROWS[path.stem].peer}.json")
        wanted, found = (json.loads(file.read_text()) for file in (alone, path))
        differences = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
        print(f"{path.stem}: largest {max(differences):.1e}, mean {sum(differences) / len(differences):.1e}")


if __name__ == "__main__":
    if "--parity" in sys.argv:
        compare_losses()
    else:
        sys.exit(main(ROWS))
