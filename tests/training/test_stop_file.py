"""A stop file ends a run of several ranks for good: all of them say so, and the file goes once all is saved."""

from pathlib import Path

from nemo_llm.errors import ExitCode
from tests.ranks import RankPool


def run_until_stopped(folder: str) -> tuple[ExitCode, int]:
    """How training ended on this rank, and after how many steps."""
    import torch.distributed as dist

    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.loop import train
    from nemo_llm.training.setup import build_training_run

    cfg = compose([
        "+model=gpt_tiny", "data=mock", "data.seq_length=64", "trainer.global_batch_size=2",
        "trainer.micro_batch_size=1", "trainer.accelerator=cpu", "trainer.max_steps=50",
        "trainer.val_interval=null", "exp_manager.enabled=false", "sample.enabled=false",
    ])  # fmt: skip
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = Path(folder)
    if dist.get_rank() == 0:
        write_config(run.run_dir, to_plain(cfg))
        (run.run_dir / "STOP").touch()
    dist.barrier()
    ending = train(run)
    return ending.code, run.state.step


def test_every_rank_is_done(ranks: RankPool, tmp_path: Path) -> None:
    endings = ranks.run(run_until_stopped, 2, str(tmp_path))
    assert [code for code, _ in endings] == [ExitCode.DONE, ExitCode.DONE]
    assert all(1 <= steps < 50 for _, steps in endings)
    assert not (tmp_path / "STOP").exists()
    assert list(tmp_path.glob("checkpoints/step_*/COMPLETE"))
