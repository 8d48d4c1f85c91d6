"""Weights alone: written and read on different numbers of ranks, twice into one folder."""

from pathlib import Path

from tests.parity.layouts import model_overrides
from tests.ranks import RankPool


def _write(folder: str, seed: int, overrides: tuple[str, ...]) -> float:
    return _with_model(folder, seed, overrides, write=True)


def _read(folder: str, seed: int, overrides: tuple[str, ...]) -> float:
    return _with_model(folder, seed, overrides, write=False)


def _with_model(folder: str, seed: int, overrides: tuple[str, ...], write: bool) -> float:
    """First element of the last norm and of the first embedding row, after writing or reading."""
    import torch.distributed as dist

    from nemo_llm.checkpoint.folder import begin, commit, temporary_of
    from nemo_llm.checkpoint.weights import load_weights, save_weights
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run

    cfg = compose([*model_overrides("gpt_tiny"), "trainer.accelerator=cpu", f"trainer.seed={seed}", *overrides])
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    final = Path(folder) / "step_00000000"
    if write:
        if dist.get_rank() == 0:
            begin(final)
        dist.barrier()
        save_weights(run.model, temporary_of(final))
        if dist.get_rank() == 0:
            commit(temporary_of(final), final)
        dist.barrier()
    else:
        load_weights(run.model, final)
    return float(next(run.model[0].parameters()).flatten()[0])


def test_weights_move_between_layouts(ranks: RankPool, tmp_path: Path) -> None:
    tp2 = ("parallelism.tensor_model_parallel_size=2",)
    for seed in (1, 2):
        written = ranks.run(_write, 2, str(tmp_path), seed, tp2)[0]
        assert ranks.run(_read, 1, str(tmp_path), 99, ())[0] == written
