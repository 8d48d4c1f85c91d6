"""The command line around a program: help, exit codes, one message and no traceback, quick imports."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nemo_llm
from nemo_llm.config import RunConfig
from nemo_llm.config.commands.entry import help_text, intended_world_size, run_command, run_entry_point
from nemo_llm.config.compose.catalog import known_keys
from nemo_llm.config.compose.load import compose
from nemo_llm.errors import CheckpointError, ConfigError, ExitCode, InputError, NemoLlmError

ROOT = Path(nemo_llm.__file__).resolve().parents[1]
PROGRAM = """
import sys
from nemo_llm.config.commands.entry import run_entry_point
sys.exit(run_entry_point(lambda cfg: print("ran", cfg.run.name)))
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def run_program(*arguments: str, folder: Path, code: str = PROGRAM, **environment: str) -> subprocess.CompletedProcess:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


def test_main_gets_the_configuration_and_its_code_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[RunConfig] = []
    assert run_entry_point(seen.append, ["+model=gpt_tiny", "optim.lr=0.5"]) == ExitCode.DONE
    assert seen[0].optim.lr == 0.5
    assert run_entry_point(lambda _cfg: ExitCode.PREEMPTED, ["+model=gpt_tiny"]) == 75
    assert capsys.readouterr() == ("", "")


class PreemptedError(NemoLlmError):
    exit_code = ExitCode.PREEMPTED


class HangError(NemoLlmError):
    exit_code = ExitCode.HANG


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no such file: x"), 2),
        (ConfigError("bad"), 2),
        (CheckpointError("disk full"), 1),
        (PreemptedError("saved"), 75),
        (HangError("step 3"), 76),
    ],
)
def test_errors_end_in_one_message_and_their_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_cfg: RunConfig) -> None:
        raise error

    assert run_entry_point(main, ["+model=gpt_tiny"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_ends_every_command_with_the_code_of_shells(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_cfg: object = None) -> None:
        raise KeyboardInterrupt

    assert run_command(main) == run_entry_point(main, ["+model=gpt_tiny"]) == 130
    assert capsys.readouterr() == ("", "")


COMPOSED = ("convert_checkpoint", "import_config", "index_dataset", "prepare_data", "train_tokenizer")
WITH_OPTIONS = {
    "inspect_checkpoint": ["verify", "/no/such/folder"],
    "inspect_dataset": ["counts", "/no/such/dataset"],
    "extend_vocabulary": ["/no/such/run", "/none", "--tokens", "/no/such/file"],
    "peft_adapter": ["merge", "/no/such/run", "/none"],
}


@pytest.mark.parametrize("tool", COMPOSED)
def test_tools_show_what_they_do_and_every_key(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"tools.{tool}")
    for flag in ("-h", "--help"):
        assert module.main(["input=x", flag]) == 0
        shown = capsys.readouterr().out
        assert module.__doc__ in shown
        assert (ROOT / "conf" / f"{tool}.yaml").read_text(encoding="utf-8") in shown


@pytest.mark.parametrize(
    ("tool", "arguments"), [*((tool, ["no_such_key=1"]) for tool in COMPOSED), *WITH_OPTIONS.items()]
)
def test_tools_end_in_one_message(tool: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"tools.{tool}").main(arguments) == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("error: ") == 1
    assert arguments[-1].partition("=")[0] in told or arguments[1] in told


def test_our_own_bugs_keep_their_traceback() -> None:
    def main(_cfg: RunConfig) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_entry_point(main, ["+model=gpt_tiny"])


def test_bad_input_through_the_real_command_line(tmp_path: Path) -> None:
    result = run_program("+model=gpt_tny", "trainer.max_step=3", "parallelism=tp2", folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "did you mean model=gpt_tiny" in result.stderr
    assert "did you mean trainer.max_steps" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_cross_section_problems_end_before_main(tmp_path: Path) -> None:
    result = run_program("+model=gpt_tiny", "parallelism=tp2", "trainer.global_batch_size=7", folder=tmp_path)
    assert result.returncode == 2
    assert "1 processes: must be a multiple of 2" in result.stderr.replace("'", "")
    assert "ran" not in result.stdout


@pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_several_ranks_print_once(
    launcher: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank_name, size_name = launcher
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv(size_name, "3")
    texts = []
    for rank in range(3):
        monkeypatch.setenv(rank_name, str(rank))
        assert run_entry_point(lambda _cfg: None, ["+model=gpt_tiny", "parallelism=tp2"]) == 2
        texts.append(capsys.readouterr().err)
    assert "3 processes" in texts[0]
    assert texts[1:] == ["", ""]
    assert len(waited) == 2, "the other ranks leave the first one time to print"


def test_no_model_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry_point(lambda _cfg: None, []) == 2
    assert "no model chosen" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--steps", "-x", "--config-dir=/no/such/folder"])
def test_unknown_options_and_folders(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry_point(lambda _cfg: None, ["+model=gpt_tiny", argument]) == 2
    assert argument.partition("=")[0] in capsys.readouterr().err


def test_config_dir_and_print_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim: {lr: 0.25}\n", encoding="utf-8")
    called: list[RunConfig] = []
    arguments = ["+model=gpt_tiny", "+experiment=mine", "--config-dir", str(tmp_path), "--print-config"]
    assert run_entry_point(called.append, arguments) == 0
    assert "lr: 0.25" in capsys.readouterr().out
    assert not called


def test_help_lists_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry_point(lambda _cfg: None, ["--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text("python -m nemo_llm.train", "Train a language model.").strip()
    for wanted in ("gpt_tiny", "optim/sched", "trainer.max_steps: a whole number above 0", "--config-dir"):
        assert wanted in text
    sections = {name.rpartition(".")[0] for name in known_keys()}
    assert all(name in text for name in known_keys() if name not in sections)


def test_help_and_import_are_quick_and_without_torch(tmp_path: Path) -> None:
    code = "import sys\nfrom nemo_llm.config.commands.entry import run_entry_point\n"
    code += "run_entry_point(lambda cfg: None)\n"
    code += "assert not {'torch', 'hydra', 'pydantic', 'megatron'} & set(sys.modules)\n"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run_program("--help", folder=tmp_path, code=code)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
    assert min(seconds) < 1.0
    imported = run_program(folder=tmp_path, code="import nemo_llm, sys; assert 'torch' not in sys.modules")
    assert imported.returncode == 0, imported.stderr


def test_composing_needs_no_torch(tmp_path: Path) -> None:
    code = (
        PROGRAM.replace("sys.exit(", "print(").rstrip()
        + "\nassert not {'torch', 'megatron', 'nemo'} & set(sys.modules)"
    )
    result = run_program("+model=gpt_tiny", folder=tmp_path, code=code)
    assert result.returncode == 0, result.stderr
    assert "ran gpt_tiny" in result.stdout


def test_intended_world_size() -> None:
    cfg = compose(["+model=gpt_tiny", "trainer.devices=8", "trainer.num_nodes=4"])
    assert intended_world_size(cfg, {}) == 1
    assert intended_world_size(cfg, {"RANK": "0", "WORLD_SIZE": "4"}) == 4
    imagined = compose(["+model=gpt_tiny", "trainer.devices=8", "trainer.num_nodes=4", "trainer.check_only=true"])
    assert intended_world_size(imagined, {}) == 32
    assert intended_world_size(imagined, {"RANK": "0", "WORLD_SIZE": "4"}) == 4
