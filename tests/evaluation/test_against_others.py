"""Our figures beside those of lm-eval's own Hugging Face backend, our texts beside those of transformers."""

from pathlib import Path

import pytest

from tests.evaluation.world import (
    hf_greedy,
    import_model,
    make_hf_model,
    our_greedy,
    run_ours,
    run_theirs,
    write_task_files,
)
from tests.ranks import RankPool

TEXTS = ["Call me Ishmael.", "The", "It was the best of times, it was the worst of times, it was", "To be, or not"]


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    make_hf_model(folder / "hf")
    ranks.run(import_model, 1, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_task_files(Path(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def theirs(ranks: RankPool, folder: str, files: dict[str, str]) -> dict:
    return ranks.run(run_theirs, 1, folder, files)[0]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, "parallelism=single"), (2, "parallelism=tp2"), (2, "parallelism=pp2"), (2, "parallelism=dp")],
    ids=["one process", "TP2", "PP2", "DP2"],
)
def test_every_score_equals_lm_evals_hugging_face_backend(
    ranks: RankPool, folder: str, files: dict[str, str], theirs: dict, processes: int, layout: str
) -> None:
    for ours in ranks.run(run_ours, processes, folder, files, layout):
        assert set(ours["samples"]) == set(theirs["samples"]) == set(files)
        for task, rows in theirs["samples"].items():
            for (number, name, expected), (our_number, our_name, found) in zip(
                rows, ours["samples"][task], strict=True
            ):
                assert (our_number, our_name) == (number, name)
                assert flat(found) == pytest.approx(flat(expected), abs=1e-4), f"{task} {number}"
            assert ours["figures"][task] == pytest.approx(theirs["figures"][task], rel=1e-4)


def flat(value: object) -> dict[str, object]:
    """Nested lists as one mapping, so that numbers are compared approximately and texts exactly."""
    if isinstance(value, list | tuple):
        return {f"{i}.{key}": part for i, item in enumerate(value) for key, part in flat(item).items()}
    return {"": float(value) if isinstance(value, bool) else value}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_texts_equal_transformers(ranks: RankPool, folder: str, batch_size: int) -> None:
    expected = ranks.run(hf_greedy, 1, folder, TEXTS, 24)[0]
    assert ranks.run(our_greedy, 1, folder, TEXTS, 24, batch_size)[0] == expected
    assert len({token for tokens in expected for token in tokens}) > 20
