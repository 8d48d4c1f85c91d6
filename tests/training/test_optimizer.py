"""Gradients and weights that the build is told of once, against Megatron's own look-up and copies in each step."""

import pytest

from tests.ranks import RankPool

TENSOR_PARALLEL = ["parallelism.tensor_model_parallel_size=2", "parallelism.sequence_parallel=true"]
CASES = {
    "bf16": (1, ["+model=moe_tiny", "precision=bf16"]),
    "fp16": (1, ["+model=gpt_tiny", "precision=fp16"]),
    "fp32": (1, ["+model=moe_tiny"]),
    "gradients in bf16": (1, ["+model=gpt_tiny", "precision=bf16", "precision.grad_reduce_in_fp32=false"]),
    "Muon": (1, ["+model=gpt_tiny", "precision=bf16", "optim=muon"]),
    "moments offloaded": (1, ["+model=gpt_tiny", "precision=bf16", "performance.offload_optimizer_moments=true"]),
    "distributed": (2, ["+model=moe_tiny", "precision=bf16", "parallelism.use_distributed_optimizer=true"]),
    "distributed, fp32": (2, ["+model=gpt_tiny", "parallelism.use_distributed_optimizer=true"]),
    "tensor parallel": (2, ["+model=moe_tiny", "precision=bf16", *TENSOR_PARALLEL]),
    "LoRA": (1, ["+model=gpt_tiny", "precision=bf16", "+peft=lora", "checkpoint.init_from=null"]),
}  # fmt: skip
# What an instance of Megatron's optimizers was given in place of a method of its class.
REPLACED = (
    "get_main_grads_for_grad_norm",
    "_copy_main_params_to_model_params",
    "_copy_model_grads_to_main_grads",
    "zero_grad",
)


def _three_steps(options: list[str], plainly: bool) -> tuple[list, dict, int]:
    """Losses and gradient norms, the weights, and how many methods of Megatron's were replaced."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.megatron.optimizer import optimizer_parts, owned_ranges
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    common = ["trainer.accelerator=cpu", "data.seq_length=64", "trainer.global_batch_size=4"]
    cfg = compose([*options, *common, "trainer.micro_batch_size=1", "exp_manager.enabled=false"])
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    replaced = 0
    for part in optimizer_parts(run.optimizer):
        replaced += sum(name in vars(part) for name in REPLACED)
        if plainly:
            part.optimizer.halves = {}
            for name in REPLACED:
                vars(part).pop(name, None)
            for _, _, main in owned_ranges(part):
                main.grad = None
    results = [train_step(run) for _ in range(3)]
    weights = {name: p.detach().clone() for chunk in run.model for name, p in chunk.named_parameters()}
    return [(r.loss, r.grad_norm, r.skipped) for r in results], weights, replaced


@pytest.mark.parametrize("case", CASES)
def test_equals_megatrons_own_walks(ranks: RankPool, case: str) -> None:
    world_size, options = CASES[case]
    ways = [ranks.run(_three_steps, world_size, options, plainly) for plainly in (False, True)]
    for (figures, weights, replaced), (wanted, others, _) in zip(*ways, strict=True):
        assert figures == wanted
        assert not [name for name in weights if not weights[name].equal(others[name])]
        assert replaced >= (1 if case == "fp32" else 2)


def test_neighbours_in_a_buffer_are_joined() -> None:
    import torch

    from nemo_llm.optim import build

    buffer, other = torch.arange(100.0), torch.ones(7)
    views = [buffer[10:30].view(4, 5), buffer[40:50], other, buffer[30:40]]
    joined = build._joined(views)
    assert sorted(t.numel() for t in joined) == [7, 40]
    (whole,) = (t for t in joined if t.numel() == 40)
    assert whole.equal(buffer[10:50])
    assert whole.data_ptr() == buffer[10:].data_ptr()
    assert len(build._joined([buffer[:10], buffer[11:20]])) == 2
