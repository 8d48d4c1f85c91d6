"""What can be said of the scripts and the image's parts without running a job."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.slurm_faults import OPTIONS
from tests.test_architecture import ROOT

BIN = Path(sys.executable).parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TOOL = ROOT / "tools/image_requirements.py"


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) >= 10
    command = [str(BIN / "shellcheck"), "-x", *(script.name for script in SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT / "slurm", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    command = [str(BIN / "hadolint"), "--no-color", str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.name not in ("agent.sh", "lib.sh", "job.sh")], ids=lambda p: p.name
)
def test_every_script_has_help(script: Path) -> None:
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, check=True)
    assert script.name in done.stdout


def test_a_rank_that_has_saved_is_no_failure_for_srun(tmp_path: Path) -> None:
    """75 is written down and told as 0; any other code is passed on."""
    for code, told in ((0, 0), (75, 0), (3, 3)):
        command = ["bash", str(ROOT / "slurm/rank.sh"), str(tmp_path), "bash", "-c", f"echo said; exit {code}"]
        assert subprocess.run(command, check=False).returncode == told
        assert (tmp_path / "rank_0000.end").read_text().split()[0] == str(code)
    assert (tmp_path / "rank_0000.log").read_text() == "said\n"


def test_a_rank_hands_signals_on_and_keeps_the_programs_code(tmp_path: Path) -> None:
    program = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
    program += "print(1, flush=True); time.sleep(60)"
    command = ["bash", str(ROOT / "slurm/rank.sh"), str(tmp_path), sys.executable, "-c", program]
    process = subprocess.Popen(command)
    while not (tmp_path / "rank_0000.log").exists() or not (tmp_path / "rank_0000.log").read_text():
        assert process.poll() is None
    process.send_signal(10)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "rank_0000.end").read_text().split()[0] == "75"


def test_the_images_torch_is_pinned_and_a_change_is_noticed(tmp_path: Path) -> None:
    wanted, constraints = tmp_path / "wanted", tmp_path / "constraints"
    subprocess.run([sys.executable, str(TOOL), str(wanted), str(constraints)], check=True, capture_output=True)
    pins = dict(line.split("==") for line in constraints.read_text().splitlines())
    import torch

    assert pins["torch"] == torch.__version__  # the installed one, whatever the lock says
    assert "torch" not in [line[:5] for line in wanted.read_text().splitlines()]
    assert not any(line.startswith("apex") for line in wanted.read_text().splitlines())
    verify = [sys.executable, str(TOOL), "--verify", str(constraints)]
    assert subprocess.run(verify, check=False, capture_output=True).returncode == 0
    constraints.write_text("torch==1.0\n")
    done = subprocess.run(verify, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch: 1.0 became" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+model=gpt_tiny", "optim.lrr=1"], "did you mean optim.lr?"),
        (["--processes=two", "+model=gpt_tiny"], "take whole numbers, not two"),
        (["--nodes=2", "+model=gpt_tiny"], "--nodes=2: no such option"),
    ],
)
def test_without_slurm_a_mistake_ends_before_any_rank_starts(tmp_path: Path, words: list[str], said: str) -> None:
    environment = {**os.environ, "NEMO_LLM_PYTHON": sys.executable}
    command = ["bash", str(ROOT / "slurm/local.sh"), *words, f"run.dir={tmp_path}/run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_slurm_a_stop_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """torchrun's agent would end on the signal, or start its ranks anew: it does neither, and the ranks save."""
    environment = {**os.environ, "NEMO_LLM_PYTHON": sys.executable}
    command = ["bash", str(ROOT / "slurm/local.sh"), "--processes=2", *OPTIONS, f"run.dir={tmp_path}/run"]
    command += ["trainer.max_steps=100000", "checkpoint.save_interval=null"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert json.loads((tmp_path / "run/exit.json").read_text())["meaning"] == "preempted"
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*/COMPLETE")
    step = int(saved.parent.name.removeprefix("step_"))
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"]
    command[-2] = f"trainer.max_steps={step + 2}"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, step + 3))


def _in_job(run_dir: Path, words: str) -> str:
    """What a function of job.sh prints for a run folder."""
    script = f'. "{ROOT}/slurm/lib.sh"; . "{ROOT}/slurm/job.sh"; RUN_DIR=$1 STATE=$1/slurm STEP_BEFORE=0; {words}'
    command = ["bash", "-uc", script, "bash", str(run_dir)]
    return subprocess.run(command, cwd=run_dir, capture_output=True, text=True, check=False).stdout.strip()


def test_nothing_that_lies_in_a_run_folder_is_evaluated(tmp_path: Path) -> None:
    """Bash evaluates what stands within its arithmetic, commands in an array's index among it."""
    payloads = ["0+a[$(touch made)]", "a[$(touch made)]", "$(touch made)", "9" * 40, "08", ""]
    for name in (*payloads, "00000012"):
        folder = tmp_path / "checkpoints" / f"step_{name}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()
    (tmp_path / "slurm").mkdir()
    assert _in_job(tmp_path, "newest_checkpoint") == "12"
    for payload in payloads:
        for line in (f"0 {payload}", f"{payload} 1", f"{payload} {payload}"):
            (tmp_path / "slurm" / "retries").write_text(line + "\n")
            assert _in_job(tmp_path, "count_retries 0") in ("1", "9")
    (tmp_path / "slurm" / "retries").write_text("0 2\n")
    assert _in_job(tmp_path, "count_retries 0") == "3"
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.rglob("made"))


@pytest.mark.parametrize("quoted", ["/a b/c", '"/a b/c"', "'/a b/c'"])
def test_a_run_folder_in_hydras_quotes_is_the_folder_that_hydra_reads(tmp_path: Path, quoted: str) -> None:
    script = f'. "{ROOT}/slurm/lib.sh"; OVERRIDES=("run.dir=$1"); override run.dir'
    done = subprocess.run(["bash", "-uc", script, "bash", quoted], capture_output=True, text=True, check=True)
    assert done.stdout == "/a b/c"
