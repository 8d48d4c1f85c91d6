"""What is compiled once stays so: neither a growing batch nor the last one of a validation set makes new shapes."""

from tests.ranks import RankPool


def _frames() -> list[int]:
    """How many graphs there are after every step and validation of a run whose batch grows."""
    import torch
    from megatron.core.utils import unwrap_model
    from torch._dynamo.testing import CompileCounterWithBackend

    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step
    from nemo_llm.training.validation import validate

    cfg = compose(
        [
            "+model=gpt_tiny",
            "trainer.accelerator=cpu",
            "data.seq_length=32",
            "trainer.global_batch_size=5",
            "trainer.micro_batch_size=1",
            "trainer.rampup_batch_size={start_global_batch_size: 1, increment: 2, ramp_samples: 8}",
            "trainer.val_steps=1000",
            "performance.compile_layers=true",  # on CPU it compiles nothing of its own; weights are not marked with it
            "exp_manager.enabled=false",
        ]
    )
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    counter = CompileCounterWithBackend("eager")
    for layer in unwrap_model(run.model[0]).decoder.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False, backend=counter)
    frames, sizes = [], set()
    for step in range(1, 9):
        sizes.add(run.ramp.global_batch_size(step))
        train_step(run)
        if step in (1, 8):
            last = [len(loader.source) % cfg.trainer.global_batch_size for loader in run.validation.values()]
            assert any(last), "every validation set ends with a whole batch"
            validate(run)
        frames.append(counter.frame_count)
    assert sizes == {1, 3, 5}
    return frames


def test_growing_and_last_batches_compile_nothing(ranks: RankPool) -> None:
    frames = ranks.run(_frames, 1)[0]
    assert frames[0] > 0
    assert set(frames) == {frames[0]}
