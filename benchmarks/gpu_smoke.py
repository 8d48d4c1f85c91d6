"""Is this GPU machine fit, and does the GPU compute what the CPU does? Under 8 minutes on one GPU.

``python -m benchmarks.gpu_smoke [--report FILE] [--only NAME ...]``. Each check prints one line; one that failed makes
the exit code 1. With ``--recompute`` every setting of recomputation is tried instead (benchmarks/recompute.py).
"""

import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# fp32 on both, but cuBLAS and SDPA add in another order than the CPU does, and Adam carries that on.
GOLDEN_TOLERANCE = 2e-4


def golden(model: str) -> str:
    """Ten fp32 steps on the GPU against the losses that the CPU gave."""
    steps = _train_losses(model, [])
    wanted = json.loads((ROOT / f"tests/golden/{model}_fp32.json").read_text())["steps"]
    worst = max(
        abs(a - b) / abs(b) for got, want in zip(steps, wanted, strict=True) for a, b in zip(got, want, strict=True)
    )
    assert worst < GOLDEN_TOLERANCE, f"relative difference {worst:.1e}"
    return f"largest relative difference of loss and gradient norm over 10 steps: {worst:.1e}"


def _train_losses(model: str, overrides: list[str], device: str = "auto") -> list[list[float]]:
    code = (
        "import json, sys; from tests.parity.layouts import train_losses; "
        f"print('LOSSES', json.dumps(train_losses({model!r}, tuple({overrides!r}), ('trainer.accelerator={device}',))))"
    )
    output = _run([sys.executable, "-c", code], **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}))
    return json.loads(next(line for line in output.splitlines() if line.startswith("LOSSES")).split(" ", 1)[1])


def overlap() -> str:
    """Overlapped gradient reduction and parameter gathering change no bit."""
    base = ["parallelism.use_distributed_optimizer=true", "precision=bf16"]
    overlapped = [*base, "parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true"]
    plain, other = _train_losses("gpt_tiny", base), _train_losses("gpt_tiny", overlapped)
    assert plain == other, f"{plain[-1]} without, {other[-1]} with overlap"
    return "ten bf16 steps bit-equal with overlap on and off"


def offloaded() -> str:
    """Moments and activations in host memory change no bit; Muon in fp32 gives what it gives on the CPU."""
    base = ["precision=bf16", "trainer.deterministic=true", "trainer.micro_batch_size=4", "data.seq_length=512"]
    plain = _train_losses("gpt_tiny", base)
    for option in ("performance.offload_optimizer_moments=true", "performance.offload_activation_layers=3"):
        other = _train_losses("gpt_tiny", [*base, option])
        assert plain == other, f"{plain[-1]} without, {other[-1]} with {option}"
    muon = {device: _train_losses("gpt_tiny", ["optim=muon"], device) for device in ("cpu", "cuda")}
    worst = max(
        abs(a - b) / abs(b) for one, two in zip(*muon.values(), strict=True) for a, b in zip(one, two, strict=True)
    )
    assert worst < GOLDEN_TOLERANCE, f"Muon differs from the CPU by {worst:.1e}"
    return f"ten bf16 steps bit-equal with either offloaded; Muon on CPU and GPU: {worst:.1e}"


def kill_and_resume() -> str:
    """20 steps equal kill -9 after a save, then resume to 20: every later row bit-equal."""
    folder = Path(tempfile.mkdtemp())
    options = [
        "+model=gpt_tiny", "precision=bf16", "trainer.max_steps=20", "trainer.log_interval=1", "trainer.val_interval=null",
        "trainer.deterministic=true", "checkpoint.save_interval=5", "exp_manager.enabled=false", "sample.enabled=false",
    ]  # fmt: skip
    _train([*options, f"run.dir={folder}/whole"])
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_llm.train", *options, f"run.dir={folder}/killed"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while _last_step(folder / "killed") < 8 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = _last_step(folder / "killed")
    _train([*options, f"run.dir={folder}/killed"])
    rows = [_losses(folder / name) for name in ("whole", "killed")]
    shutil.rmtree(folder)
    assert rows[0] == rows[1], f"{rows[0][-1]} undisturbed, {rows[1][-1]} after the kill"
    return f"killed after step {killed_at}, resumed; 20 losses and gradient norms bit-equal"


def cpu_and_gpu() -> str:
    """Ten steps on one device, resumed for ten on the other, both ways, against twenty on the first (fp32)."""
    folder = Path(tempfile.mkdtemp())
    options = [
        "+model=gpt_tiny", "trainer.log_interval=1", "trainer.val_interval=null", "checkpoint.save_interval=10",
        "optim.sched.warmup_steps=2", "optim.sched.decay_steps=20", "trainer.deterministic=true", "exp_manager.enabled=false", "sample.enabled=false",
    ]  # fmt: skip

    def moved(before: str, after: str) -> str:
        _train([*options, "trainer.max_steps=20", f"run.dir={folder}/whole_{before}"], before)
        _train([*options, "trainer.max_steps=10", f"run.dir={folder}/{before}"], before)
        _train([*options, "trainer.max_steps=20", f"run.dir={folder}/{before}"], after)
        wanted, got = _losses(folder / f"whole_{before}"), _losses(folder / before)
        assert [row[0] for row in got] == [row[0] for row in wanted], f"steps {[row[0] for row in got]}"
        differences = [
            max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))
            for one, other in zip(got, wanted, strict=True)
        ]
        first, worst = differences[10], max(differences)
        assert max(differences[:10]) == 0, f"two runs on {before} differ by {max(differences[:10]):.1e}"
        assert first < 1e-5, f"{before} to {after}: the first step differs by {first:.1e}"
        assert worst < GOLDEN_TOLERANCE, f"{before} to {after}: relative difference {worst:.1e}"
        return f"{before} to {after} {first:.1e}, {worst:.1e}"

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(moved, ("cuda", "cpu"), ("cpu", "cuda")))
    shutil.rmtree(folder)
    return f"relative difference at the first step after it and over ten: {'; '.join(found)}"


def hang() -> str:
    """Two ranks over NCCL, one of them frozen: the other says so, leaves NCCL's flight recorder, and ends with code 76."""
    folder = Path(tempfile.mkdtemp())
    options = [
        "+model=gpt_tiny", "precision=bf16", "trainer.max_steps=100000", "trainer.global_batch_size=16", "trainer.log_interval=1",
        "trainer.val_interval=null", "trainer.step_timeout_minutes=0.1", "exp_manager.enabled=false", "sample.enabled=false",
        "checkpoint.save_interval=null", f"run.dir={folder}/run",
    ]  # fmt: skip
    ranks = _start_two_ranks(folder, options)
    try:
        deadline = time.monotonic() + 120
        while _last_step(folder / "run") < 5 and time.monotonic() < deadline and ranks[0].poll() is None:
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = ranks[0].wait(timeout=90)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    seconds = time.monotonic() - began
    output = (folder / "rank_0.log").read_text()
    said = [line for line in output.splitlines() if "rank 1" in line]
    assert code == 76, f"exit code {code}: {output[-1500:]}"
    assert said, f"rank 1 is not named: {output[-1500:]}"
    # NCCL's recorder writes a pickle; this one is our own, made a moment ago.
    trace = pickle.loads((folder / "run" / "flight_recorder" / "rank_0").read_bytes())
    waiting = [entry for entry in trace["entries"] if entry["state"] != "completed"]
    assert waiting, f"all {len(trace['entries'])} collectives are recorded as completed"
    shutil.rmtree(folder)
    return (
        f"code 76 after {seconds:.0f} s, {said[0].strip()[:160]!r}; flight recorder: {len(trace['entries'])} collectives, "
        f"{len(waiting)} not completed, first of them {waiting[0]['profiling_name']}"
    )


def kernel_cache() -> str:
    """Two ranks and empty caches: the first rank compiles, and once the other goes on no kernel is missing.

    Of models with norms on queries and keys, whose rotation is PyTorch's to compile, the rest is reported.
    """
    plain = ["data=mock", "precision=bf16", "trainer.max_steps=3", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
             "trainer.val_interval=null", "exp_manager.enabled=false", "sample.enabled=false", "checkpoint.save_interval=null",
             "checkpoint.save_final=false", "model.num_layers=2"]  # fmt: skip
    cases = {
        "llama3_1b": ["+model=llama3_1b", "parallelism.use_distributed_optimizer=true"],
        "qwen3_0_6b, TP2": ["+model=qwen3_0_6b", "parallelism=tp2"],
    }
    found = []
    for name, options in cases.items():
        folder = Path(tempfile.mkdtemp())
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        (folder / "triton").mkdir()
        ranks = _start_two_ranks(folder, [*options, *plain, f"run.dir={folder}/run"], **caches)
        log, warmed = folder / "rank_0.log", None
        while any(rank.poll() is None for rank in ranks):
            if warmed is None and "kernels compiled" in log.read_text():
                warmed = {entry.name for entry in (folder / "triton").iterdir()}
            time.sleep(0.02)
        output = log.read_text()
        assert all(rank.wait() == 0 for rank in ranks), output[-1500:] + (folder / "rank_1.log").read_text()[-1500:]
        assert warmed, f"rank 0 does not say that it compiled kernels: {output[-1500:]}"
        later = {entry.name for entry in (folder / "triton").iterdir()} - warmed
        kernels = sorted(file.stem for entry in later for file in (folder / "triton" / entry).glob("*.cubin"))
        assert not kernels or "qwen3" in name, f"{name}: compiled after the first rank's turn: {kernels}"
        seconds = output.split("node's cache in ")[1].split(" s")[0]
        found.append(f"{name}: {len(warmed)} entries in {seconds} s, later {', '.join(kernels) or 'none'}")
        shutil.rmtree(folder)
    return "; ".join(found)


def nemo() -> str:
    """NeMo's exp_manager runs the experiment and writes TensorBoard's file."""
    folder = tempfile.mkdtemp()
    _train(["+model=gpt_tiny", "precision=bf16", "trainer.max_steps=5", "sample.enabled=false", f"run.dir={folder}"])
    events = list(Path(folder).rglob("events.out.tfevents*"))
    assert events, f"no TensorBoard file under {folder}"
    return f"{len(list((Path(folder) / 'logs').iterdir()))} files in logs/, TensorBoard's among them"


def gpt_1b() -> str:
    """Fifty bf16 steps of gpt_1b on real tokens."""
    folder = Path(tempfile.mkdtemp())
    output = _train(
        ["+model=gpt_1b", "trainer.max_steps=50", "trainer.log_interval=10", "trainer.val_interval=null",
         "trainer.global_batch_size=16", "trainer.micro_batch_size=4", "exp_manager.enabled=false", "sample.enabled=false",
         "checkpoint.save_interval=null", "checkpoint.save_final=false", f"run.dir={folder}"]
    )  # fmt: skip
    line = [line for line in output.splitlines() if line.startswith("step")][-1]
    return line


CHECKS: dict[str, Callable[[], str]] = {
    "golden gpt_tiny": lambda: golden("gpt_tiny"),
    "golden moe_tiny": lambda: golden("moe_tiny"),
    "overlap": overlap,
    "offloading and Muon": offloaded,
    "kill and resume": kill_and_resume,
    "CPU and GPU": cpu_and_gpu,
    "hang": hang,
    "kernel cache": kernel_cache,
    "NeMo": nemo,
    "gpt_1b": gpt_1b,
}
GPUS = {"hang": 2, "kernel cache": 2}
"""Checks that are left out where there are fewer."""


def main() -> int:
    """Run the checks and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--recompute", action="store_true")
    arguments = parser.parse_args()
    if arguments.recompute:
        from benchmarks import recompute  # imports Megatron, which the other checks do in processes of their own

        return recompute.main()
    rows = []
    for name, check in CHECKS.items():
        if arguments.only and name not in arguments.only:
            continue
        if torch.cuda.device_count() < GPUS.get(name, 0):
            print(f"left out {name}: needs {GPUS[name]} GPUs")
            continue
        began = time.perf_counter()
        try:
            outcome, detail = "passed", check()
        except (AssertionError, subprocess.SubprocessError, OSError) as error:
            outcome, detail = "FAILED", str(error)
        rows.append(
            {"check": name, "outcome": outcome, "seconds": round(time.perf_counter() - began, 1), "detail": detail}
        )
        print(f"{outcome:7} {name:16} {rows[-1]['seconds']:6.1f} s  {detail}", flush=True)
    if arguments.report:
        arguments.report.write_text(json.dumps(rows, indent=1))
    return int(any(row["outcome"] == "FAILED" for row in rows))


def _run(command: list[str], **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": _path(), "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def _start_two_ranks(folder: Path, options: list[str], **environment: str) -> list[subprocess.Popen]:
    """Both on this machine, their output in ``folder``."""
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29567", "PYTHONPATH": _path()}
        command = [sys.executable, "-W", "ignore", "-m", "nemo_llm.train", *options]
        with (folder / f"rank_{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **place, **address, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return ranks


def _path() -> str:
    return f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"


def _train(overrides: list[str], device: str = "cuda") -> str:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return _run([sys.executable, "-m", "nemo_llm.train", *overrides], **hidden)


def _rows(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def _last_step(run_dir: Path) -> int:
    rows = _rows(run_dir)
    return rows[-1]["step"] if rows else 0


def _losses(run_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in _rows(run_dir)]


if __name__ == "__main__":
    sys.exit(main())
