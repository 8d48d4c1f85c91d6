"""From text to a trained model, killed in each of its three commands (the fast sibling is in test_prepare.py)."""

from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from benchmarks.data_pipeline_kills import trials


@pytest.mark.slow
def test_no_document_is_lost_or_repeated_by_kills(tmp_path: Path) -> None:
    counts = trials(tmp_path, kills=9, seed=11)
    assert not [name for name in counts if name.startswith("FAILED")], counts
    assert counts["kills"] >= 9
    assert counts["journeys without a document lost or repeated"] == counts["journeys"]
