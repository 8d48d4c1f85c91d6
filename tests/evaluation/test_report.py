"""Pictures of the evaluation report: a curve belongs to one run, and a bar to a value."""

import re
from pathlib import Path

from nemo_llm.evaluation.report import write_html
from nemo_llm.evaluation.suite import ModelResult


def page(tmp_path: Path, *measured: tuple[str, int | None, float]) -> str:
    """The page of results (checkpoint folder, step, accuracy)."""
    results = [
        ModelResult(Path(folder).name, folder, step, tasks={"lambada": {"acc,none": value, "samples": 10}})
        for folder, step, value in measured
    ]
    write_html(results, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_checkpoints_of_one_run_are_one_curve(tmp_path: Path) -> None:
    run = "/runs/a/checkpoints/step_"
    text = page(tmp_path, (f"{run}00000010", 10, 0.1), (f"{run}00000030", 30, 0.3), (f"{run}00000020", 20, 0.4))
    (line,) = re.findall(r'<polyline points="([^"]*)"', text)
    across = [float(point.partition(",")[0]) for point in line.split()]
    assert across == sorted(across)
    assert "<rect" not in text


def test_different_models_are_never_one_curve(tmp_path: Path) -> None:
    text = page(
        tmp_path, ("/runs/a/checkpoints/step_00000012", 12, 0.1), ("/runs/b/checkpoints/step_00000060", 60, 0.3)
    )
    assert "<polyline" not in text
    assert text.count("<rect") == 2
    imported = page(tmp_path, ("/runs/a/checkpoints/step_00000012", 12, 0.1), ("/models/imported", None, 0.3))
    assert "<polyline" not in imported


def test_several_steps_of_two_runs_are_two_curves_with_their_names(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        *(
            (f"/runs/{run}/checkpoints/step_{step:08d}", step, step / 100)
            for run in ("wide", "deep")
            for step in (1, 2)
        ),
    )
    lines = re.findall(r'<polyline points="([^"]*)" fill="none" stroke="([^"]*)"', text)
    assert len(lines) == 2
    assert len({colour for _, colour in lines}) == 2
    assert all(len(points.split()) == 2 for points, _ in lines)
    assert ">wide <" in text
    assert ">deep <" in text


def test_a_value_of_zero_has_no_bar_and_bars_begin_at_zero(tmp_path: Path) -> None:
    text = page(tmp_path, ("/models/a", None, 0.0), ("/models/b", None, 0.5), ("/models/c", None, 0.25))
    heights = [float(height) for height in re.findall(r'<rect [^>]* height="([^"]*)"', text)]
    assert heights[0] == 0.0
    assert abs(heights[1] - 2 * heights[2]) < 0.2
