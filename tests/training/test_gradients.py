"""Gradients that the first product overwrites equal those that are added to zeros, whatever lay in the buffer."""

import pytest

from tests.ranks import RankPool

CASES = {
    "dense": ["+model=gpt_tiny"],
    "untied": ["+model=gpt_tiny", "model.share_embeddings_and_output_weights=false"],
    "bf16, whole logits": [
        "+model=gpt_tiny", "precision=bf16", "model.share_embeddings_and_output_weights=false",
        "performance.fused_linear_cross_entropy=false",
    ],
    "several chunks of tokens": [
        "+model=gpt_tiny", "model.share_embeddings_and_output_weights=false",
        "performance.cross_entropy_chunk_tokens=32",
    ],
    "FP8": ["+model=gpt_tiny", "precision=fp8_tensorwise"],
    "experts": ["+model=moe_tiny"],
    "recomputed": [
        "+model=gpt_tiny", "parallelism.recompute_granularity=full", "parallelism.recompute_method=uniform",
        "parallelism.recompute_num_layers=1",
    ],
    "LoRA": ["+model=gpt_tiny", "+peft=lora", "checkpoint.init_from=null"],
}  # fmt: skip


def _gradients(options: list[str]) -> tuple[int, int, list[str]]:
    """Marked parameters, others, and the names of those whose gradient is not the one that is added to zeros."""
    import torch

    from nemo_llm.config.compose.load import compose
    from nemo_llm.megatron.optimizer import forget_gradients
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import forward_backward

    cfg = compose(
        [
            *options,
            "trainer.accelerator=cpu",
            "data.seq_length=64",
            "trainer.global_batch_size=4",
            "trainer.micro_batch_size=2",
            "exp_manager.enabled=false",
        ]
    )
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    batches = run.loader.micro_batches(0, 4)
    parameters = {name: p for name, p in run.model[0].named_parameters() if hasattr(p, "main_grad")}
    marked = {name: p for name, p in parameters.items() if hasattr(p, "overwrites_gradient")}

    def forget_and_poison(chunk) -> None:
        forget_gradients(chunk)
        for name, parameter in parameters.items():
            assert parameter.main_grad.count_nonzero() == 0 or name in marked
            if name in marked:
                parameter.main_grad.fill_(torch.nan)

    from nemo_llm.training import step

    step.forget_gradients, forget = forget_and_poison, step.forget_gradients
    try:
        overwritten = _after(forward_backward, run, batches, parameters)
        step.forget_gradients = lambda chunk: chunk.zero_grad_buffer()
        added = _after(forward_backward, run, batches, parameters)
    finally:
        step.forget_gradients = forget
    different = [name for name in parameters if not torch.equal(overwritten[name], added[name])]
    return len(marked), len(parameters) - len(marked), different


def _after(forward_backward, run, batches, parameters) -> dict:
    """The buffers after this step."""
    forward_backward(run, batches)
    return {name: parameter.main_grad.clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("case", CASES)
def test_overwriting_equals_adding_to_zeros(ranks: RankPool, case: str) -> None:
    marked, others, different = ranks.run(_gradients, 1, CASES[case])[0]
    assert not different
    assert others > 0
    assert (marked == 0) == (case == "LoRA")


def _untouched() -> list[float]:
    """What a marked gradient holds after a step that did not use its weight."""
    import torch

    from nemo_llm.config.compose.load import compose
    from nemo_llm.megatron.optimizer import forget_gradients
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run, zero_untouched

    cfg = compose(["+model=gpt_tiny", "trainer.accelerator=cpu", "exp_manager.enabled=false"])
    (chunk,) = build_training_run(cfg, start_runtime(cfg.runtime_setting)).model
    for buffer in chunk.buffers:
        buffer.grad_data.fill_(7.0)
    forget_gradients(chunk)
    zero_untouched(chunk)
    return torch.cat([buffer.grad_data for buffer in chunk.buffers]).unique().tolist()


def test_a_weight_that_was_not_used_has_a_gradient_of_zero(ranks: RankPool) -> None:
    (found,) = ranks.run(_untouched, 1)
    assert found == [0.0]
