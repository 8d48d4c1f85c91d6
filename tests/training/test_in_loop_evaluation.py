"""Evaluation while training: it changes nothing that follows."""

import json
from pathlib import Path

import pytest

from nemo_llm.config.compose.load import compose
from nemo_llm.errors import ConfigError
from nemo_llm.training.evaluate_in_loop import read_evaluation
from tests.ranks import RankPool

SIZES = [
    "+model=gpt_tiny",
    "trainer.accelerator=cpu",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2",
    "data.seq_length=64",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "evaluation.interval=1",
    "evaluation.limit=3",
]


def keys(folder: str, *overrides: str) -> list[str]:
    measured = [f"evaluation.tasks={{blimp: {folder}/blimp.jsonl}}", f"evaluation.texts={folder}/text.txt"]
    return [*SIZES, *measured, *overrides]


def steps_with_and_without(folder: str) -> list[list[float]]:
    """Losses of some steps under dropout, with an evaluation after each and without any; and random numbers after."""
    import torch

    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.evaluate_in_loop import read_evaluation
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose(keys(folder, "model.hidden_dropout=0.1"))
    runtime = start_runtime(cfg.runtime_setting)
    found = []
    for measured in (True, False):
        torch.manual_seed(5)
        run = build_training_run(cfg, runtime)
        evaluation = read_evaluation(cfg.evaluation)
        losses = []
        for _ in range(3):
            losses.append(train_step(run).loss)
            if measured:
                evaluation.measure(run)
        found.append([*losses, float(torch.rand(1))])
    return found


def figures_on(folder: str, overrides: list[str]) -> dict[str, float]:
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.evaluate_in_loop import read_evaluation
    from nemo_llm.training.setup import build_training_run

    cfg = compose(keys(folder, *overrides))
    return read_evaluation(cfg.evaluation).measure(build_training_run(cfg, start_runtime(cfg.runtime_setting)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"sentence_good": f"Thou {w} it.", "sentence_bad": f"It {w} thou."} for w in ("see", "hear", "love", "do")]
    (folder / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    return str(folder)


def test_evaluation_changes_nothing(ranks: RankPool, folder: str) -> None:
    measured, plain = ranks.run(steps_with_and_without, 1, folder)[0]
    assert measured == plain


@pytest.fixture(scope="module")
def alone(ranks: RankPool, folder: str) -> dict[str, float]:
    return ranks.run(figures_on, 1, folder, [])[0]


def test_figures_are_named(alone: dict[str, float], folder: str) -> None:
    assert set(alone) == {f"{folder}/text.txt/bits_per_byte", "blimp/acc"}
    assert alone[f"{folder}/text.txt/bits_per_byte"] > 1


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2_vp2", "cp2", "dp"])
def test_every_layout_measures_what_one_process_does(
    ranks: RankPool, folder: str, alone: dict[str, float], layout: str
) -> None:
    for figures in ranks.run(figures_on, 2, folder, [f"parallelism={layout}"]):
        assert figures == pytest.approx(alone, rel=1e-5)


def test_bad_keys_are_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        read_evaluation(compose(["+model=gpt_tiny", "evaluation.interval=5"]).evaluation)
    with pytest.raises(ConfigError, match="gsm8k generates text"):
        read_evaluation(compose(["+model=gpt_tiny", "evaluation.interval=5", "evaluation.tasks={gsm8k: x}"]).evaluation)
    assert read_evaluation(compose(["+model=gpt_tiny"]).evaluation) is None
