"""Speeds from known times: warm-up apart, both attention conventions, and an ETA that stray steps do not move."""

import pytest

from nemo_llm.run.throughput import FlopsPerToken, Peak, ThroughputMeter


def meter(warmup_steps=0, num_devices=1, peak=None, causal=6e9, full=8e9):
    return ThroughputMeter(
        flops_per_token=FlopsPerToken(causal=causal, full=full),
        num_devices=num_devices,
        peak=peak,
        warmup_steps=warmup_steps,
    )


def test_speeds_of_a_span():
    speeds = meter(num_devices=4, peak=Peak("H100", 989.0))
    speeds.record_step(400_000, 400_000, 1.0, 0.1)
    speeds.record_step(400_000, 400_000, 3.0, 0.3)
    report = speeds.report(tokens_left=0)
    assert report.step_time_seconds == 2.0
    assert report.tokens_per_second == 200_000
    assert report.tokens_per_second_per_device == 50_000
    assert report.tflops_per_device == pytest.approx(300)
    assert report.tflops_per_device_full == pytest.approx(400)
    assert report.mfu_causal == pytest.approx(300 / 989)
    assert report.mfu_full == pytest.approx(400 / 989)
    assert report.data_wait_fraction == pytest.approx(0.1)


def test_no_peak_means_no_mfu():
    speeds = meter()
    speeds.record_step(100, 100, 1.0, 0.0)
    report = speeds.report(tokens_left=10)
    assert (report.mfu_causal, report.mfu_full, report.peak) == (None, None, None)


def test_warm_up_steps_are_told_apart():
    speeds = meter(warmup_steps=3)
    speeds.record_step(100, 100, 50.0, 0.0)
    first = speeds.report(tokens_left=1000)
    assert first.warm_up
    assert first.tokens_per_second == 2
    assert first.eta_seconds is None
    assert speeds.overall() is None
    speeds.record_step(100, 100, 50.0, 0.0)
    speeds.record_step(100, 100, 50.0, 0.0)
    speeds.record_step(100, 100, 1.0, 0.0)
    second = speeds.report(tokens_left=1000)
    assert not second.warm_up
    assert second.tokens_per_second == 100
    assert second.eta_seconds == pytest.approx(10)
    assert speeds.overall().tokens_per_second == 100


def test_each_report_covers_its_own_span_and_overall_covers_all():
    speeds = meter()
    speeds.record_step(100, 100, 1.0, 0.0)
    assert speeds.report(0).tokens_per_second == 100
    speeds.record_step(100, 100, 4.0, 0.0)
    assert speeds.report(0).tokens_per_second == 25
    assert speeds.overall().tokens_per_second == 40


def test_learned_tokens_are_a_figure_of_their_own_and_may_be_none():
    speeds = meter(peak=Peak("H100", 989.0))
    for learned in (10, 0, 20):
        speeds.record_step(400, learned, 1.0, 0.0)
    some, alike = speeds.report(tokens_left=4000), meter()
    assert (some.tokens_per_second, some.learned_tokens_per_second, some.eta_seconds) == (400, 10, 10)
    alike.record_step(400, 400, 1.0, 0.0)
    assert alike.report(0).tflops_per_device == some.tflops_per_device
    nothing = meter()
    nothing.record_step(400, 0, 1.0, 0.0)
    assert nothing.report(tokens_left=400).learned_tokens_per_second == 0


def test_report_without_steps_is_refused():
    speeds = meter()
    with pytest.raises(ValueError, match="no step"):
        speeds.report(0)


def test_time_left_shrugs_off_stray_slow_steps():
    speeds = meter()
    for step in range(100):
        speeds.record_step(100, 100, 60.0 if step % 10 == 0 else 1.0, 0.0)
    assert speeds.report(tokens_left=5000).eta_seconds == pytest.approx(50)


def test_time_left_follows_a_lasting_change_and_a_growing_batch():
    speeds = meter()
    for _ in range(500):
        speeds.record_step(100, 100, 1.0, 0.0)
    for _ in range(100):
        speeds.record_step(400, 400, 8.0, 0.0)
    assert speeds.report(tokens_left=4000).eta_seconds == pytest.approx(80)


def test_pauses_count_in_the_time_left_and_not_in_the_speed():
    speeds = meter(warmup_steps=1)
    speeds.record_pause(1000.0)  # before the first step: start-up
    speeds.record_step(100, 100, 30.0, 0.0)
    for _ in range(10):
        speeds.record_step(100, 100, 1.0, 0.0)
    speeds.record_pause(5.0)
    report = speeds.report(tokens_left=1000)
    assert report.tokens_per_second == 100
    assert report.eta_seconds == pytest.approx(10 * 1.0 + 5.0)
