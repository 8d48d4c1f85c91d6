"""A run that was saved and loaded goes on as if nothing had happened: bit by bit in its layout, closely in another."""

from pathlib import Path

import pytest

from tests.parity.layouts import model_overrides
from tests.ranks import RankPool

BEFORE, AFTER = 2, 3


def _train(model: str, overrides: tuple[str, ...], folder: str, save_at: int | None, load: bool) -> list[tuple]:
    """Losses and norms of the steps from the start, or from the checkpoint in ``folder``, to step 5."""
    import torch.distributed as dist

    from nemo_llm.checkpoint.folder import find_checkpoint
    from nemo_llm.checkpoint.manifest import verify
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import load_checkpoint, save_checkpoint
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose([*model_overrides(model), "trainer.accelerator=cpu", *overrides])
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = Path(folder)
    if dist.get_rank() == 0 and not load:
        run.run_dir.mkdir(exist_ok=True)
        write_config(run.run_dir, to_plain(cfg))
    dist.barrier()
    if load:
        found = find_checkpoint(run.run_dir)
        assert found is not None
        verify(found)
        load_checkpoint(run, found)
        assert run.state.step == BEFORE
    rows = []
    while run.state.step < BEFORE + AFTER:
        result = train_step(run)
        rows.append((result.loss, result.grad_norm))
        if run.state.step == save_at:
            save_checkpoint(run)
    return rows


ZERO1 = "parallelism.use_distributed_optimizer=true"
TP2 = ("parallelism.tensor_model_parallel_size=2", "parallelism.sequence_parallel=true", ZERO1)
PP2 = ("parallelism.pipeline_model_parallel_size=2", ZERO1)
VPP2 = ("parallelism.pipeline_model_parallel_size=2", "parallelism.virtual_pipeline_model_parallel_size=2", ZERO1)
EP2 = ("parallelism.expert_model_parallel_size=2", ZERO1)
TP2_ONLY = ("precision=bf16", "parallelism.tensor_model_parallel_size=2")
MUON_TP2 = ("optim=muon", *TP2)
TP2_ETP1 = (*TP2, "parallelism.expert_tensor_parallel_size=1")
ETP2 = ("parallelism.expert_tensor_parallel_size=2", ZERO1)
TP2_EP2 = (*TP2, "parallelism.expert_model_parallel_size=2")


@pytest.mark.parametrize(
    ("model", "world", "overrides"),
    [
        pytest.param("gpt_tiny", 1, (), marks=pytest.mark.slow),
        ("gpt_tiny", 2, (ZERO1,)),
        pytest.param("gpt_tiny", 2, TP2, marks=pytest.mark.slow),
        ("gpt_tiny", 2, VPP2),
        pytest.param("gpt_tiny", 1, ("precision=bf16", ZERO1), marks=pytest.mark.slow),
        ("gpt_tiny", 1, ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "precision=bf16", ZERO1)),
        ("moe_tiny", 2, EP2),
        ("gpt_tiny", 2, MUON_TP2),
        ("gpt_tiny", 1, ("precision=bf16", ZERO1, "performance.offload_optimizer_moments=true")),
    ],
    ids=[
        "one process",
        "DP2 distributed optimizer",
        "TP2",
        "PP2 VPP2",
        "bf16",
        "dropout and bf16",
        "EP2",
        "Muon TP2",
        "offloaded moments",
    ],
)
def test_same_layout_goes_on_bit_by_bit(
    model: str, world: int, overrides: tuple[str, ...], ranks: RankPool, tmp_path: Path
) -> None:
    whole = ranks.run(_train, world, model, overrides, str(tmp_path), BEFORE, False)[0]
    resumed = ranks.run(_train, world, model, overrides, str(tmp_path), None, True)[0]
    assert resumed == whole[BEFORE:]


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        ("gpt_tiny", (2, TP2), (1, (ZERO1,))),
        ("gpt_tiny", (1, ()), (2, PP2)),
        (
            "gpt_tiny",
            (2, ("precision=bf16", ZERO1)),
            (2, ("precision=bf16", "parallelism.tensor_model_parallel_size=2")),
        ),
        ("moe_tiny", (2, EP2), (1, ())),
        ("gpt_tiny", (2, MUON_TP2), (1, ("optim=muon",))),
        ("moe_tiny", (1, ()), (4, TP2_EP2)),
        pytest.param("moe_tiny", (4, TP2_EP2), (2, PP2), marks=pytest.mark.slow),
        pytest.param("moe_tiny", (2, TP2_ETP1), (2, ETP2), marks=pytest.mark.slow),
        pytest.param("moe_tiny", (2, ETP2), (1, ()), marks=pytest.mark.slow),
    ],
    ids=[
        "TP2 to one process",
        "not distributed optimizer to distributed, PP2",
        "bf16 DP2 to TP2, optimizer not distributed",
        "EP2 to one process, optimizer not distributed",
        "Muon, TP2 to one process",
        "one process to TP2 EP2",
        "TP2 EP2 to PP2",
        "TP2 ETP1 to ETP2",
        "ETP2 to one process, optimizer not distributed",
    ],
)
def test_another_layout_goes_on_closely(
    model: str, first: tuple, second: tuple, ranks: RankPool, tmp_path: Path
) -> None:
    whole = ranks.run(_train, first[0], model, first[1], str(tmp_path), BEFORE, False)[0]
    resumed = ranks.run(_train, second[0], model, second[1], str(tmp_path), None, True)[0]
    for wanted, found in zip(whole[BEFORE:], resumed, strict=True):
        assert found == pytest.approx(wanted, rel=2e-3 if "precision=bf16" in first[1] else 1e-5)


def test_a_damaged_file_is_named(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_train, 1, "gpt_tiny", (), str(tmp_path), BEFORE, False)
    victim = next((tmp_path / "checkpoints/step_00000002/state").glob("*.distcp"))
    flip_a_byte(victim)
    with pytest.raises(AssertionError, match=f"{victim.name}: damaged"):
        ranks.run(_train, 1, "gpt_tiny", (), str(tmp_path), None, True)


def _start_from(overrides: tuple[str, ...], folder: str) -> tuple[int, float, int]:
    """Step after resume.resume, the loss of the next step, and the updates that the optimizer had counted before."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.resume import resume
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose([*model_overrides("gpt_tiny"), "trainer.accelerator=cpu", f"run.dir={folder}", *overrides])
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = Path(folder)
    resume(run)
    step = run.state.step
    updates = max(group.get("step", 0) for group in run.optimizer.param_groups)
    return step, train_step(run).loss, updates


def test_weights_alone_start_a_new_run_on_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    whole = ranks.run(_train, 2, "gpt_tiny", TP2, str(tmp_path / "old"), BEFORE, False)[0]
    overrides = (ZERO1, f"checkpoint.init_from={tmp_path}/old")
    step, loss, updates = ranks.run(_start_from, 1, overrides, str(tmp_path / "new"))[0]
    assert step == 0
    assert updates == 0
    assert loss < whole[0][0] - 1e-4  # the first batch again, with weights that have seen it


def test_a_damaged_checkpoint_is_passed_over_for_the_last_good_one(ranks: RankPool, tmp_path: Path) -> None:
    import shutil

    ranks.run(_train, 1, "gpt_tiny", (ZERO1,), str(tmp_path), BEFORE, False)
    checkpoints = tmp_path / "checkpoints"
    later = checkpoints / "step_00000009"
    shutil.copytree(checkpoints / "step_00000002", later)
    flip_a_byte(next((later / "state").glob("*.distcp")))
    assert ranks.run(_start_from, 2, (ZERO1,), str(tmp_path))[0][0] == BEFORE
    assert sorted(path.name for path in checkpoints.iterdir()) == ["set_aside_1_step_00000009", "step_00000002"]


def test_another_model_or_vocabulary_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_train, 1, "gpt_tiny", (), str(tmp_path), BEFORE, False)
    with pytest.raises(AssertionError, match=r"another model[\s\S]*: expected \[256.*found \[128"):
        ranks.run(_start_from, 1, ("model.hidden_size=256",), str(tmp_path))
    with pytest.raises(AssertionError, match=r"word_embeddings.weight: expected \[4096, 128\], found"):
        ranks.run(_start_from, 1, ("model.vocab_size=4096",), str(tmp_path))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
