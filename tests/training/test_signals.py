"""Real signals sent to this process and to a child, the time budget, and the stop file."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from nemo_llm.errors import ExitCode
from nemo_llm.resilience.stop_signals import StopSignals


class Clock:
    """Seconds that the test moves on."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_leaves_a_note_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopSignals(None, None) as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), number)
        reason = stop.poll()
    assert (reason.kind, reason.detail) == ("signal", number.name)
    assert abs(reason.unix_time - time.time()) < 60
    assert reason.exit_code == ExitCode.PREEMPTED
    assert signal.getsignal(number) == before


def test_first_reason_is_kept_and_later_signals_are_counted():
    clock = Clock()
    with StopSignals(None, 1.0, clock) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        first = stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        clock.seconds += 3600
        assert stop.poll() is first
        assert stop.signal_count == 3


def test_third_sigint_within_seconds_interrupts():
    with StopSignals(None, None, Clock()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll().detail == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_slow_sigints_never_interrupt():
    clock = Clock()
    with StopSignals(None, None, clock) as stop:
        for _ in range(6):
            clock.seconds += 4
            signal.raise_signal(signal.SIGINT)
        assert stop.signal_count == 6


def test_time_budget():
    clock = Clock()
    with StopSignals(None, 1.5, clock) as stop:
        clock.seconds += 89
        assert stop.poll() is None
        clock.seconds += 1
        reason = stop.poll()
    assert reason.kind == "time_limit"
    assert "trainer.max_time_minutes = 1.5" in reason.detail
    assert reason.exit_code == ExitCode.PREEMPTED


def test_stop_file_ends_the_run_once_and_is_looked_for_once_a_second(tmp_path):
    clock = Clock()
    with StopSignals(tmp_path, None, clock) as stop:
        assert stop.poll() is None
        (tmp_path / "STOP").touch()
        clock.seconds += 0.5
        assert stop.poll() is None
        clock.seconds += 0.5
        reason = stop.poll()
        assert stop.poll() is reason
    assert reason.kind == "stop_file"
    assert str(tmp_path / "STOP") in reason.detail
    assert reason.exit_code == ExitCode.DONE
    with StopSignals(tmp_path, None, clock) as stop:  # killed before it had saved: the next one still finds it
        reason = stop.poll()
        assert reason.kind == "stop_file"
        stop.stopped(dataclasses.replace(reason, kind="signal"))  # other ranks were told to go on later
        assert (tmp_path / "STOP").exists()
        stop.stopped(reason)
    assert not (tmp_path / "STOP").exists()
    with StopSignals(tmp_path, None, clock) as stop:
        assert stop.poll() is None


CHILD = """
import time
from nemo_llm.resilience.stop_signals import StopSignals
with StopSignals(None, None) as stop:
    print("ready", flush=True)
    while stop.signal_count < 2:
        time.sleep(0.01)
    print("saved", stop.poll().detail, flush=True)
"""


def test_second_signal_does_not_end_a_process_that_is_saving():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=30)[0] == "saved SIGTERM\n"
    assert child.returncode == 0
