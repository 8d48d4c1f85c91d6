"""Which checkpoints stay: newest, multiples, best; real folders with real manifests."""

import json
import shutil
from pathlib import Path

import pytest

from nemo_llm.checkpoint.folder import find_checkpoints, remove, remove_old, step_of, writing
from nemo_llm.config.compose.load import compose

LOSSES = {10: 5.0, 20: 4.0, 30: 1.0, 40: 3.0, 50: None, 60: 2.0}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step, loss in LOSSES.items():
        with writing(tmp_path / f"step_{step:08d}") as folder:
            (folder / "training.json").write_text(json.dumps({"validation_loss": loss}))
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ("checkpoint.keep_last=null", [10, 20, 30, 40, 50, 60]),
        ("checkpoint.keep_last=1", [60]),
        ("checkpoint.keep_last=2 checkpoint.keep_every=20", [20, 40, 50, 60]),
        ("checkpoint.keep_last=1 checkpoint.keep_best=2", [30, 60]),
        ("checkpoint.keep_last=1 checkpoint.keep_best=3", [30, 40, 60]),
    ],
)
def test_what_stays(overrides: str, kept: list[int], checkpoints: Path) -> None:
    unfinished = checkpoints / ".step_00000070.tmp"
    unfinished.mkdir()
    incomplete = checkpoints / "step_00000080"
    incomplete.mkdir()
    settings = compose(["+model=gpt_tiny", *overrides.split()]).checkpoint
    remove_old(checkpoints, settings)
    assert sorted(step_of(folder) or 0 for folder in find_checkpoints(checkpoints)) == kept
    assert not unfinished.exists()
    assert incomplete.exists()  # without a marker it is no checkpoint, and nobody's to remove


def test_what_a_kill_leaves_of_a_removed_checkpoint_goes_later(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compose(["+model=gpt_tiny", "checkpoint.keep_last=null"]).checkpoint
    before = set(checkpoints.iterdir())
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before the first file is gone
        remove(checkpoints / "step_00000020")
    assert 20 not in [step_of(folder) for folder in find_checkpoints(checkpoints)]
    remove_old(checkpoints, settings)
    assert set(checkpoints.iterdir()) == before - {checkpoints / "step_00000020"}
