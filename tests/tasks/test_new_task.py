"""A task that the package does not know trains on every layout: nothing beside its class knows what is learned."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from nemo_llm.config import TaskConfig
from nemo_llm.config.checks import check
from nemo_llm.config.compose.catalog import choices_of, conf_dir, union_members
from nemo_llm.config.compose.load import compose
from nemo_llm.config.sections.fields import Section
from nemo_llm.config.sections.run import RunConfig
from nemo_llm.errors import ConfigError, Problem
from nemo_llm.tasks import TASKS
from nemo_llm.tasks.base import ForwardStep, MicroBatch, Task, token_losses
from tests.parity.layouts import DENSE, model_overrides
from tests.ranks import RankPool

STEPS = 3
LAYOUTS = [layout for layout in DENSE if layout.name in ("DP2", "TP2", "PP2 VPP2", "CP2 all-to-all", "PP2")]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSection(Section):
    """Keys of the task below."""

    name: Literal["sequences"]
    norm: float


class Sequences(Task):
    """Token losses summed over each sequence; the mean is over sequences."""

    source_kinds = frozenset({"text"})

    def check(self, sections: RunConfig) -> Iterator[Problem]:
        """Sequences are counted by their first position."""
        if sections.data.reset_position_ids:
            yield Problem("data.reset_position_ids", True, "would count documents", "set it to false")

    def forward_step(self, batches: Iterator[MicroBatch], model: Any) -> ForwardStep:
        """Sums of losses, their squares, tokens and sequences."""
        batch = next(batches)

        def sums(output: Any) -> Any:
            losses, mask = output if output.dim() == 2 else output[0], batch["loss_mask"]
            total, tokens = (losses * mask).sum(), mask.sum()
            named = {"loss": total, "squares": (losses.square() * mask).sum(), "tokens": tokens}
            named["sequences"] = (batch["position_ids"] == 0).sum()  # a position lies on one context-parallel rank
            if output.dim() == 3:
                named["hits"] = (output[1] * mask).sum()
            return total, tokens.int(), {name: value.detach().double() for name, value in named.items()}

        return token_losses(batch, model), sums

    def denominator(self, sums: Mapping[str, Any]) -> Any:
        """Sequences, by a key of the task's own."""
        return sums["sequences"] * self.section.norm

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss of a sequence, and two figures that no other task has."""
        figures = {
            "loss": sums["loss"] / sums["sequences"] / self.section.norm,
            "squared_loss": sums["squares"] / sums["tokens"],
            "tokens_per_sequence": sums["tokens"] / sums["sequences"],
        }
        return figures | ({"hits_per_sequence": sums["hits"] / sums["sequences"]} if "hits" in sums else {})


def _config(*overrides: str) -> RunConfig:
    cfg = compose([*model_overrides("gpt_tiny"), "trainer.accelerator=cpu", "exp_manager.enabled=false", *overrides])
    return dataclasses.replace(cfg, task=SequenceSection(name="sequences", norm=2.0))  # type: ignore[arg-type]


def train(folder: str, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` of a short run with a validation at its end; empty but on the first rank."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.metrics import read_metrics
    from nemo_llm.training.lifecycle import close_run, open_run
    from nemo_llm.training.loop import train
    from nemo_llm.training.setup import build_training_run

    TASKS["sequences"] = Sequences
    keys = (f"run.dir={folder}", f"trainer.max_steps={STEPS}", "trainer.log_interval=1", "trainer.val_steps=2")
    cfg = _config(*keys, "checkpoint.save_final=false", "sample.enabled=false", *overrides)
    run = build_training_run(cfg, start_runtime(cfg))
    with open_run(run):
        close_run(run, train(run))
    return read_metrics(run.run_dir) if run.runtime.is_first_rank else []


@pytest.fixture(scope="module")
def single(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of one process."""
    return ranks.run(train, 1, str(tmp_path_factory.mktemp("single") / "run"), ())[0]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What every layout computes alike."""
    timed = ("second", "tflops")
    return {
        key: value for key, value in row.items() if isinstance(value, float | int) and not any(t in key for t in timed)
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_gives_the_figures_of_one_process(
    layout: Any, ranks: RankPool, tmp_path: Path, single: list[dict[str, Any]]
) -> None:
    rows = ranks.run(train, layout.processes, str(tmp_path / "run"), layout.overrides)[0]
    assert len(rows) == len(single) == STEPS + 1
    for row, expected in zip(rows, single, strict=True):
        assert _numbers(row) == pytest.approx(_numbers(expected), rel=2e-5)


def test_figures_and_gradient_are_those_of_the_same_sum_divided_otherwise(
    ranks: RankPool, single: list[dict[str, Any]]
) -> None:
    """Beside pretraining, which divides the same sum by tokens."""
    from tests.parity.layouts import train_losses

    ((loss, norm),) = ranks.run(train_losses, 1, "gpt_tiny", (), (), 1)[0]
    first, validation = single[0], single[-1]
    assert first["tokens_per_sequence"] * 8 == first["learned_tokens"] > 8
    assert first["loss"] == pytest.approx(loss * first["tokens_per_sequence"] / 2.0)
    assert first["grad_norm"] == pytest.approx(norm * first["tokens_per_sequence"] / 2.0)
    assert first["squared_loss"] > loss**2
    assert "hits_per_sequence" not in first
    figures = {name for name in validation if name.startswith("val_")}
    named = {"loss", "squared_loss", "tokens_per_sequence", "hits_per_sequence", "accuracy", "name"}
    assert figures == {f"val_{name}" for name in named}
    assert validation["val_accuracy"] is None


def test_its_checks_and_kinds_of_sources_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "sequences", Sequences)
    check(_config(), 1)
    mock = "data.blend=[{name: noise, mock: {num_documents: 9, mean_document_length: 9}}]"
    with pytest.raises(ConfigError, match="of kind mock, and task=sequences learns from text"):
        check(_config(mock), 1)
    with pytest.raises(ConfigError, match="would count documents"):
        check(_config("data.reset_position_ids=true"), 1)


def test_every_task_has_its_keys_and_its_file() -> None:
    names = {path.stem for path in (conf_dir() / "task").glob("*.yaml")}
    sections = [choices_of(section.__annotations__["name"]) for section in union_members(TaskConfig)]
    assert sorted(name for choices in sections for name in choices) == sorted(names)
    assert set(TASKS) - {"sequences"} == names


@pytest.mark.parametrize("name", ["classification", "score"])
def test_a_key_of_another_task_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"task.z_loss_coeff = 0.1: .*name {name} has no such key"):
        compose(["+model=gpt_tiny", f"task={name}", "task.z_loss_coeff=0.1"])
