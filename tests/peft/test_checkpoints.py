"""Adapters saved, resumed on another layout, refused on another base, exported to peft, merged into plain weights."""

from pathlib import Path

import pytest

from tests.peft.test_against_peft import LENGTH, MODEL, VOCAB, _copy_base, _hf_model
from tests.ranks import RankPool

PEFT = ["peft=lora", "peft.rank=4", "peft.alpha=8", "peft.ranks={linear_fc2: 2}"]
RUN = [
    *(key for key in MODEL if not key.startswith("data.")),
    "data=mock",
    "trainer.global_batch_size=4",
    "optim.lr=1e-2",
    "optim.sched.warmup_steps=1",
    "model.make_vocab_size_divisible_by=128",
]
TP2 = ("parallelism.tensor_model_parallel_size=2", "parallelism.sequence_parallel=true")


def _keys(folder: str, overrides: tuple[str, ...] = ()) -> list[str]:
    return [*RUN, f"data.seq_length={LENGTH}", f"checkpoint.init_from={folder}/base", *PEFT, *overrides]


def write_base(folder: str) -> None:
    """The Hugging Face model of the sibling test as a checkpoint of ours."""
    from megatron.core.utils import unwrap_model

    from nemo_llm.checkpoint.folder import writing
    from nemo_llm.checkpoint.weights import save_weights
    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime

    cfg = compose(MODEL)
    chunks = build_model_chunks(cfg.model_setting, start_runtime(cfg.runtime_setting), VOCAB)
    _copy_base(_hf_model(), unwrap_model(chunks[0]))
    with writing(Path(folder) / "base" / "step_00000000") as temporary:
        save_weights(chunks, temporary)


def train(folder: str, steps: int, overrides: tuple[str, ...] = ()) -> tuple[list[float], list[list[float]] | None]:
    """Losses from the checkpoint that is there, if any; saves at the end; and logits of fixed tokens on one process."""
    import torch
    import torch.distributed as dist

    from nemo_llm.checkpoint.folder import find_checkpoint
    from nemo_llm.config.compose.load import compose
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import load_checkpoint, save_checkpoint
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose(_keys(folder, overrides))
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    run.run_dir = Path(folder) / "run"
    if dist.get_rank() == 0 and not run.run_dir.exists():
        run.run_dir.mkdir()
        write_config(run.run_dir, to_plain(cfg))
    dist.barrier()
    if (found := find_checkpoint(run.run_dir)) is not None:
        load_checkpoint(run, found)
    losses = [train_step(run).loss for _ in range(steps)]
    if steps:
        save_checkpoint(run)
    if dist.get_world_size() > 1:
        return losses, None
    ids = torch.arange(LENGTH)[None] % VOCAB
    with torch.no_grad():
        logits = run.model[0](ids, torch.arange(LENGTH)[None], None)
    return losses, logits[0, :, :VOCAB].tolist()


def merged_logits(folder: str) -> list[list[float]]:
    """Logits of the same tokens from the merged checkpoint, by a model that knows no adapter."""
    import torch

    from nemo_llm.checkpoint.weights import load_weights
    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime

    cfg = compose(MODEL)
    chunks = build_model_chunks(cfg.model_setting, start_runtime(cfg.runtime_setting), VOCAB)
    load_weights(chunks, Path(folder) / "merged")
    with torch.no_grad():
        ids = torch.arange(LENGTH)[None] % VOCAB
        return chunks[0](ids, torch.arange(LENGTH)[None], None)[0, :, :VOCAB].tolist()


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, list]:
    """A folder with a base and a run of four steps: two on one process, two resumed on TP2; logits after them."""
    folder = tmp_path_factory.mktemp("adapter")
    ranks.run(write_base, 1, str(folder))
    whole, _ = ranks.run(train, 1, str(folder), 2)[0]
    rest, _ = ranks.run(train, 2, str(folder), 2, TP2)[0]
    _, logits = ranks.run(train, 1, str(folder), 0)[0]
    return folder, [*whole, *rest], logits


def test_a_resumed_run_goes_on_on_another_layout(trained, ranks: RankPool, tmp_path: Path) -> None:
    folder, losses, _ = trained
    (tmp_path / "base").symlink_to(folder / "base")
    alone, _ = ranks.run(train, 1, str(tmp_path), 4)[0]
    assert losses == pytest.approx(alone, rel=2e-5)
    assert losses[-1] != losses[0]


def test_checkpoints_hold_the_adapter_alone(trained) -> None:
    from nemo_llm.checkpoint.inspect import tensors

    names = list(tensors(trained[0] / "run" / "checkpoints" / "step_00000004"))
    assert names
    assert all("adapter." in name for name in names)


def test_plain_peft_loads_the_exported_adapter(trained, tmp_path: Path) -> None:
    import peft
    import torch

    from tools.peft_adapter import main

    folder, _, logits = trained
    assert main(["export", str(folder / "run"), str(tmp_path / "hf"), "--base-model", "base"]) == 0
    adapted = peft.PeftModel.from_pretrained(_hf_model(), tmp_path / "hf").eval()
    with torch.no_grad():
        theirs = adapted(torch.arange(LENGTH)[None] % VOCAB).logits[0]
        plain = _hf_model()(torch.arange(LENGTH)[None] % VOCAB).logits[0]
    ours = torch.tensor(logits)
    assert float((theirs - ours).abs().max()) < 1e-4
    assert float((plain - ours).abs().max()) > 1e-2


def test_the_merged_checkpoint_does_the_same(trained, ranks: RankPool) -> None:
    import torch

    folder, _, logits = trained
    ranks.run(merge, 1, str(folder))
    merged = torch.tensor(ranks.run(merged_logits, 1, str(folder))[0])
    assert float((merged - torch.tensor(logits)).abs().max()) < 1e-5


def merge(folder: str) -> None:
    """The tool's work, in a rank that is up."""
    from nemo_llm.convert.peft_adapters import merge_checkpoint

    merge_checkpoint(Path(folder) / "run", Path(folder) / "merged")


def test_an_adapter_of_another_base_is_refused(trained, ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="adapter for another base model"):
        ranks.run(train, 1, str(trained[0]), 1, ("checkpoint.init_from=null",))


def test_a_pattern_that_matches_nothing_names_the_nearest(trained, ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="did you mean linear_proj"):
        ranks.run(train, 1, str(trained[0]), 1, ("peft.target_modules=[linear_projj]",))


def load_as_weights(folder: str) -> None:
    """What generation and evaluation do with a checkpoint."""
    from nemo_llm.checkpoint.weights import load_weights
    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.build import build_model_chunks
    from nemo_llm.parallel.runtime import start_runtime

    cfg = compose(MODEL)
    chunks = build_model_chunks(cfg.model_setting, start_runtime(cfg.runtime_setting), VOCAB)
    load_weights(chunks, Path(folder) / "run" / "checkpoints" / "step_00000004")


def test_an_adapter_is_not_taken_for_weights(trained, ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"holds an adapter.*\n.*merge"):
        ranks.run(load_as_weights, 1, str(trained[0]))
