"""The layouts that must compute what one process computes, and the training that compares them."""

from dataclasses import dataclass

STEPS = 10


@dataclass(frozen=True)
class Layout:
    """A name, the number of processes and the overrides that make the layout."""

    name: str
    processes: int
    overrides: tuple[str, ...] = ()


def _layout(name: str, processes: int, **sizes: object) -> Layout:
    long = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "sp": "sequence_parallel",
        "stages": "pipeline_model_parallel_layout",
        "zero1": "use_distributed_optimizer",
    }
    elsewhere = {"bucket": "performance.ddp_bucket_size"}
    keys = {elsewhere.get(key, f"parallelism.{long.get(key, key)}"): value for key, value in sizes.items()}
    return Layout(name, processes, tuple(f"{key}={_plain(value)}" for key, value in keys.items()))


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


DENSE = [
    _layout("DP2", 2),
    _layout("DP2 distributed optimizer", 2, zero1=True),
    _layout(
        "DP4 distributed optimizer, overlapped",
        4,
        zero1=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket=50000,
    ),
    _layout("TP2", 2, tp=2),
    _layout("TP2 SP", 2, tp=2, sp=True),
    _layout("PP2", 2, pp=2),
    _layout("PP2 VPP2", 2, pp=2, vpp=2),
    _layout("PP2 uneven", 2, pp=2, stages="'Ettt|tL'"),
    _layout("PP2 VPP2 uneven", 2, pp=2, vpp=2, stages="'Et|t|t|tL'"),
    _layout("CP2 all-to-all", 2, cp=2, cp_comm_type="a2a"),
    _layout("CP2 gathered KV", 2, cp=2, cp_comm_type="all_gather"),
    _layout("CP4 all-to-all", 4, cp=4, cp_comm_type="a2a"),
    _layout("TP2 SP PP2 distributed optimizer", 4, tp=2, sp=True, pp=2, zero1=True),
    _layout("TP2 SP CP2", 4, tp=2, sp=True, cp=2),
    _layout("PP2 CP2 distributed optimizer", 4, pp=2, cp=2, zero1=True),
    _layout("PP4", 4, pp=4),
    _layout(
        "TP2 SP DP2, full recompute",
        4,
        tp=2,
        sp=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    ),
]

MOE = [
    _layout("DP2", 2),
    _layout("EP2", 2, ep=2),
    _layout("EP2 distributed optimizer", 2, ep=2, zero1=True),
    _layout("EP4", 4, ep=4),
    _layout("TP2 SP", 2, tp=2, sp=True),
    _layout("TP2 SP EP2", 4, tp=2, sp=True, ep=2),
    _layout("TP2 SP EP2 ETP1", 4, tp=2, sp=True, ep=2, etp=1),
    _layout("TP2 SP ETP1", 2, tp=2, sp=True, etp=1),
    _layout("TP2 SP ETP1 distributed optimizer", 2, tp=2, sp=True, etp=1, zero1=True),
    _layout("ETP2", 2, etp=2),
    _layout("PP2 EP2", 4, pp=2, ep=2),
    _layout("CP2 EP2", 4, cp=2, ep=2),
]


def model_overrides(model: str) -> list[str]:
    """A small model on the shipped text; the same global batch for every layout."""
    return [
        f"+model={model}",
        "trainer.global_batch_size=8",
        "trainer.micro_batch_size=1",
        "data.seq_length=64",
        "model.hidden_size=128",
        "model.num_attention_heads=8",
        "model.num_query_groups=4",
        "optim.lr=3e-4",
        "optim.sched.warmup_steps=2",
    ]


def train_losses(
    model: str, overrides: tuple[str, ...], extra: tuple[str, ...] = (), steps: int = STEPS
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each of the first steps; runs on every rank of the world that is up."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose([*model_overrides(model), "trainer.accelerator=cpu", *overrides, *extra])
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    return [(result.loss, result.grad_norm) for result in (train_step(run) for _ in range(steps))]
