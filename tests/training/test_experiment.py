"""Experiment tracking with the real NeMo: what it writes, where, and every private name that the adapter leans on."""

import json
import logging
import logging.handlers
import os
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nemo_llm.config.sections.run_services import ExpManagerConfig
from nemo_llm.errors import ConfigError
from nemo_llm.run.experiment_loggers import LOG_FOLDER, ExperimentLogger, ExperimentRun, start_experiment

RUN_FILES = {"config.yaml": "trainer: {}\n", "metrics.jsonl": '{"step": 1}\n', "exit.json": "{}"}


def settings(**changes) -> ExpManagerConfig:
    fields = {
        "enabled": True,
        "create_tensorboard_logger": True,
        "create_wandb_logger": False,
        "wandb_logger_kwargs": {},
        "create_mlflow_logger": False,
        "mlflow_logger_kwargs": {},
    }
    return ExpManagerConfig(**{**fields, **changes})


def run_in(folder: Path, *, rank: int = 0, resume_step: int = 0) -> ExperimentRun:
    return ExperimentRun(run_dir=folder, name="a-run", rank=rank, max_steps=10, resume_step=resume_step)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name, text in RUN_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_nemo_writes_in_its_own_folder_and_leaves_the_run_folder_alone(run_dir):
    for _ in range(2):  # NeMo rotates its files at the second start
        start_experiment(settings(), run_in(run_dir)).close(succeeded=True)
    assert files_of(run_dir) == {*RUN_FILES, "checkpoints", LOG_FOLDER}
    assert {name: (run_dir / name).read_text() for name in RUN_FILES} == RUN_FILES
    written = files_of(run_dir / LOG_FOLDER)
    assert {"cmd-args.log", "nemo_error_log.txt", "lightning_logs.txt", "run_0"} <= written
    assert "cmd-args.log" in files_of(run_dir / LOG_FOLDER / "run_0")


def test_metrics_reach_tensorboard_with_their_values(run_dir):
    experiment = start_experiment(settings(), run_in(run_dir))
    experiment.log_config({"trainer": {"max_steps": 10}})
    experiment.log_metrics(1, {"loss": 2.5, "val_loss": None})
    experiment.log_metrics(2, {"loss": 1.25, "val_loss": 1.5})
    experiment.close(succeeded=True)
    assert scalars(run_dir / LOG_FOLDER, "loss") == [(1, 2.5), (2, 1.25)]
    assert scalars(run_dir / LOG_FOLDER, "val_loss") == [(2, 1.5)]
    assert "max_steps: 10" in (run_dir / LOG_FOLDER / "hparams.yaml").read_text()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_resumed_run_hides_rows_beyond_its_checkpoint(run_dir, enabled):
    first = start_experiment(settings(enabled=enabled), run_in(run_dir))
    for step in (1, 2, 3):
        first.log_metrics(step, {"loss": float(step)})
    first.close(succeeded=False)
    # Event files are named by the second, and read in the order of their names.
    (events,) = (run_dir / LOG_FOLDER).glob("events.out.tfevents.*")
    events.rename(events.with_name("events.out.tfevents.0000000001.first"))
    resumed = start_experiment(settings(enabled=enabled), run_in(run_dir, resume_step=1))
    resumed.log_metrics(2, {"loss": 20.0})
    resumed.close(succeeded=True)
    assert scalars(run_dir / LOG_FOLDER, "loss") == [(1, 1.0), (2, 20.0)]


def test_warnings_of_the_project_and_of_megatron_stand_in_the_error_log(run_dir):
    experiment = start_experiment(settings(), run_in(run_dir))
    logging.getLogger("nemo_llm.somewhere").warning("a warning of ours")
    logging.getLogger("megatron.core.somewhere").warning("a warning of Megatron's")
    experiment.close(succeeded=True)
    logging.getLogger("nemo_llm.somewhere").warning("too late")
    text = (run_dir / LOG_FOLDER / "nemo_error_log.txt").read_text()
    assert "a warning of ours" in text
    assert "a warning of Megatron's" in text
    assert "too late" not in text


def test_loggers_and_warnings_of_others_are_given_back(run_dir):
    show_warning = warnings.showwarning
    start_experiment(settings(), run_in(run_dir)).close(succeeded=True)
    assert warnings.showwarning is show_warning
    assert logging.getLogger("megatron.core").propagate is True
    for name in ("nemo_logger", "megatron.core", "lightning.pytorch"):
        kept = [type(handler) for handler in logging.getLogger(name).handlers]
        assert logging.handlers.MemoryHandler not in kept, name


def test_nemo_of_the_pinned_minor_still_cannot_make_an_mlflow_logger(run_dir):
    """When this fails, NeMo has mended it: `_mlflow_logger` can go, and `create_mlflow_logger` be passed on."""
    from nemo.package_info import __version__ as version
    from nemo.utils.exp_manager import exp_manager

    from nemo_llm.run.experiment_loggers import _SoloTrainer

    assert version.startswith("3.0."), "read the adapter's comments again before another minor is allowed"
    arguments = {"explicit_log_dir": str(run_dir / LOG_FOLDER), "name": "a", "create_tensorboard_logger": False}
    with pytest.raises(TypeError, match="run_name"):
        exp_manager(_SoloTrainer(max_steps=1), {**arguments, "create_mlflow_logger": True})


def test_mlflow_writes_a_database_in_the_run_folder(run_dir, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = start_experiment(settings(create_mlflow_logger=True), run_in(run_dir))
    experiment.log_metrics(3, {"loss": 2.5})
    experiment.close(succeeded=False)
    with sqlite3.connect(run_dir / LOG_FOLDER / "mlflow" / "mlflow.db") as database:
        assert database.execute("select key, value, step from metrics").fetchall() == [("loss", 2.5, 3)]
        assert database.execute("select name, status from runs").fetchall() == [("a-run", "FAILED")]


def test_a_tracker_that_cannot_be_reached_stops_a_new_run_and_not_a_resumed_one(run_dir, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    asked = settings(create_mlflow_logger=True, mlflow_logger_kwargs={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(ConfigError, match="MLFlowLogger"):
        start_experiment(asked, run_in(run_dir))
    resumed = start_experiment(asked, run_in(run_dir, resume_step=4))
    assert [type(backend).__name__ for backend in resumed.backends] == ["TensorBoardLogger"]
    resumed.close(succeeded=True)


def test_wandb_writes_offline_in_the_run_folder(run_dir):
    asked = settings(create_wandb_logger=True, wandb_logger_kwargs={"project": "p", "offline": True})
    experiment = start_experiment(asked, run_in(run_dir))
    experiment.log_metrics(1, {"loss": 2.5})
    experiment.close(succeeded=True)
    assert list((run_dir / LOG_FOLDER / "wandb").glob("offline-run-*/*.wandb"))
    assert files_of(run_dir) == {*RUN_FILES, "checkpoints", LOG_FOLDER}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"create_wandb_logger": True}, "exp_manager.wandb_logger_kwargs"),
        ({"create_mlflow_logger": True, "mlflow_logger_kwargs": {"nme": 1}}, "exp_manager.mlflow_logger_kwargs"),
        ({"enabled": False, "create_mlflow_logger": True}, "exp_manager.create_mlflow_logger"),
        (
            {"enabled": False, "create_wandb_logger": True, "wandb_logger_kwargs": {"project": "p"}},
            "exp_manager.create_wandb_logger",
        ),
    ],
)
def test_loggers_that_cannot_be_had_are_refused_by_key(run_dir, changes, key):
    with pytest.raises(ConfigError) as caught:
        start_experiment(settings(**changes), run_in(run_dir))
    assert [problem.key for problem in caught.value.problems] == [key]


def test_other_ranks_write_nothing(run_dir):
    experiment = start_experiment(settings(), run_in(run_dir, rank=1))
    experiment.log_metrics(1, {"loss": 1.0})
    experiment.close(succeeded=True)
    assert files_of(run_dir) == {*RUN_FILES, "checkpoints"}


def test_a_failing_backend_warns_is_dropped_and_ends_nothing(caplog):
    class Unreachable:
        calls = 0

        def log_metrics(self, metrics, step):
            self.calls += 1
            raise ConnectionError("no route to host")

        def log_hyperparams(self, params):
            pass

        def finalize(self, status):
            pass

    class Kept(Unreachable):
        def log_metrics(self, metrics, step):
            self.calls += 1

    unreachable, kept = Unreachable(), Kept()
    experiment = ExperimentLogger([unreachable, kept])
    with caplog.at_level(logging.WARNING, logger="nemo_llm"):
        logging.getLogger("nemo_llm").addHandler(caplog.handler)
        for step in range(8):
            experiment.log_metrics(step, {"loss": 1.0})
        logging.getLogger("nemo_llm").removeHandler(caplog.handler)
    assert (unreachable.calls, kept.calls) == (5, 8)
    assert experiment.backends == (kept,)
    assert "no route to host" in caplog.text


PROGRAM = """
import json, sys
from pathlib import Path
from nemo_llm.config.sections.run_services import ExpManagerConfig
from nemo_llm.run.experiment_loggers import ExperimentRun, start_experiment
asked = ExpManagerConfig(**json.loads(sys.argv[2]))
run = ExperimentRun(run_dir=Path(sys.argv[1]), name="a-run", rank=0, max_steps=1, resume_step=0)
experiment = start_experiment(asked, run)
experiment.log_metrics(1, {"loss": 2.0})
experiment.close(succeeded=True)
Path(sys.argv[1], "modules").write_text(" ".join({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_a_fresh_process_prints_nothing_and_imports_nemo_only_when_enabled(tmp_path, enabled):
    arguments = [str(tmp_path), json.dumps({name: getattr(settings(), name) for name in ExpManagerConfig.__slots__})]
    arguments[1] = json.dumps({**json.loads(arguments[1]), "enabled": enabled})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    loaded = set((tmp_path / "modules").read_text().split())
    assert ("nemo" in loaded) is enabled
    assert scalars(tmp_path / LOG_FOLDER, "loss") == [(1, 2.0)]


def test_a_logger_that_cannot_start_ends_the_run_before_its_first_step(tmp_path):
    keys = [
        "exp_manager.create_mlflow_logger=true",
        "exp_manager.mlflow_logger_kwargs={nme: 1}",
        f"run.dir={tmp_path}/r",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "nemo_llm.train", "+model=gpt_tiny", "trainer.accelerator=cpu", *keys],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "exp_manager.mlflow_logger_kwargs" in result.stderr
    assert "step" not in result.stdout
    assert json.loads((tmp_path / "r" / "exit.json").read_text())["step"] == 0
    # What the run would have read was said at its start.
    assert "training, 9,600 samples of 128 tokens" in result.stderr
    assert "moby_dick" in result.stderr
