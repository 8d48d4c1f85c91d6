"""The rows of metrics.jsonl, what a killed process leaves of it, and the progress line."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_llm.run.metrics import MetricsFile, StepRow, ValidationRow, progress_line, read_metrics
from nemo_llm.run.throughput import Peak, Throughput

# The contract with readers of the file: a change here is a change of the documented format.
STEP_KEYS = [
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "consumed_samples",
    "consumed_tokens",
    "learned_tokens",
    "step_time_seconds",
    "tokens_per_second",
    "learned_tokens_per_second",
    "tflops_per_device",
    "skipped",
]


def step_row(step, **changes):
    values = {
        "step": step,
        "loss": 0.1 + 0.2,
        "grad_norm": 1 / 3,
        "learning_rate": 2.9999999999999997e-04,
        "consumed_samples": 8 * step,
        "consumed_tokens": 1024 * step,
        "learned_tokens": 1024,
        "step_time_seconds": 0.25,
        "tokens_per_second": 4096.0,
        "learned_tokens_per_second": 4096.0,
        "tflops_per_device": 0.125,
        "skipped": False,
    }
    return StepRow(**(values | changes))


def validation_row(step):
    return ValidationRow(step=step, val_loss=2.5, val_accuracy=0.375, val_name="demo")


def test_rows_have_the_documented_keys_and_read_back_bit_for_bit(tmp_path):
    file = MetricsFile(tmp_path)
    rows = [step_row(1), validation_row(1), step_row(2, loss=math.nextafter(2.5, 3), skipped=True)]
    for row in rows:
        file.append(row)
    read = read_metrics(tmp_path)
    assert list(read[0]) == STEP_KEYS
    assert list(read[1])[:2] == ["step", "val_loss"]
    assert read == [dataclasses.asdict(row) for row in rows]


def test_numbers_that_json_lacks_become_null(tmp_path):
    MetricsFile(tmp_path).append(step_row(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is None
    assert row["grad_norm"] is None


def test_resume_drops_rows_beyond_its_step_and_goes_on(tmp_path):
    file = MetricsFile(tmp_path)
    for step in range(1, 8):
        file.append(step_row(step))
        file.append(validation_row(step))
    assert file.drop_rows_beyond(5) == 4
    file.append(step_row(6))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_dropping_nothing_leaves_the_file_alone(tmp_path):
    file = MetricsFile(tmp_path)
    file.append(step_row(1))
    before = file.path.stat()
    assert file.drop_rows_beyond(1) == 0
    assert (file.path.stat().st_ino, file.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\x00\x00"])
def test_torn_last_line_is_cut_off(tmp_path, torn):
    MetricsFile(tmp_path).append(step_row(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    MetricsFile(tmp_path).append(step_row(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_damaged_line_in_the_middle_is_dropped_on_resume(tmp_path):
    file = MetricsFile(tmp_path)
    file.append(step_row(1))
    with file.path.open("a") as other:
        other.write('\x00\x00{"step"\n')
    file.append(step_row(2))
    assert file.drop_rows_beyond(9) == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


WRITER = """
import itertools, sys
from pathlib import Path
from test_metrics import step_row
from nemo_llm.run.metrics import MetricsFile
file = MetricsFile(Path(sys.argv[1]))
for step in itertools.count(1):
    file.append(step_row(step))
    print(step, flush=True)
"""


def test_rows_written_before_a_kill_are_all_there(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    acknowledged = 0
    while acknowledged < 200:
        acknowledged = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    acknowledged = int((writer.communicate()[0].split() or [acknowledged])[-1])
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= acknowledged


def throughput(**changes):
    values = {
        "step_time_seconds": 0.5,
        "tokens_per_second": 123_456.0,
        "tokens_per_second_per_device": 15_432.0,
        "learned_tokens_per_second": 123_456.0,
        "tflops_per_device": 412.3,
        "tflops_per_device_full": 445.0,
        "mfu_causal": 0.417,
        "mfu_full": 0.45,
        "peak": Peak("H100", 989.0),
        "data_wait_fraction": 0.0031,
        "eta_seconds": 3720.0,
        "warm_up": False,
    }
    return Throughput(**(values | changes))


def test_progress_line_says_everything_in_one_line():
    line = progress_line(
        step_row(120, loss=3.21432, grad_norm=0.8124), throughput(), total_steps=1000, val_loss=3.4, memory_gib=42.13
    )
    assert line == (
        "step  120/1000 | loss 3.2143 | val 3.4000 | grad norm 0.812 | lr 3.00e-04 | 123k tokens/s (15.4k/device) | "
        "412 TFLOP/s | MFU 41.7% causal, 45.0% full, of H100 989 TFLOP/s | 42.1 GiB | data wait 0.3% | ETA 1h 02m"
    )


def test_progress_line_names_learned_tokens_where_they_are_fewer():
    some = throughput(learned_tokens_per_second=8_818.0)
    line = progress_line(step_row(1), some, total_steps=9, val_loss=None, memory_gib=None)
    assert "| 123k tokens/s (15.4k/device) | 8.82k learned tokens/s |" in line


def test_progress_line_on_cpu_claims_no_mfu_and_marks_warm_up_and_skips():
    slow = throughput(
        peak=None, mfu_causal=None, mfu_full=None, eta_seconds=None, warm_up=True, tflops_per_device=0.0123
    )
    line = progress_line(step_row(1, grad_norm=None, skipped=True), slow, total_steps=9, val_loss=None, memory_gib=None)
    assert "MFU" not in line
    assert "ETA" not in line
    assert "0.0123 TFLOP/s" in line
    assert line.endswith("(warm-up) (update skipped)")


@pytest.mark.parametrize(("seconds", "shown"), [(42.4, "42s"), (125, "2m 05s"), (7260, "2h 01m"), (200_000, "2d 07h")])
def test_time_left_is_shown_in_fitting_units(seconds, shown):
    line = progress_line(step_row(1), throughput(eta_seconds=seconds), total_steps=9, val_loss=None, memory_gib=None)
    assert line.endswith(f"ETA {shown}")
