"""Every reader of foreign files on hostile ones: a clear error with exit code 2, nothing run, written or fetched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attack import corpus
from tests.inference.world import save_random_model
from tests.ranks import RankPool
from tests.test_architecture import ROOT

_FIRST_OF_A_KIND = {
    "generate": ("metadata patches a class", "object is TorchScript", "common.pt calls os.system"),
    "train": ("metadata patches a class", "tensors call os.system"),
    "show": ("metadata calls os.system", "object calls os.system"),
    "to_hf": ("metadata sets on a class", "common.pt is TorchScript"),
}
"""Whole commands take seconds each: these by default, and with all files where slow tests are asked for."""


class Cases:
    """Hostile files below a folder, and which reader each is for."""

    def __init__(self, work: Path, sound: Path) -> None:
        self.work, self.sound = work, sound
        self.rows: list[dict[str, str]] = []
        (work / "out").mkdir()
        # TorchScript reads the source of what it compiles from a file.
        (work / "script.py").write_text(corpus.SCRIPT.replace("MARKER", str(self.marker)))
        subprocess.run([sys.executable, str(work / "script.py"), str(work / "script.pt")], check=True)
        self.marker.unlink(missing_ok=True)

    @property
    def marker(self) -> Path:
        return self.work / "MARKER"

    def add(self, name: str, path: Path, *readers: str) -> None:
        self.rows += [{"name": name, "path": str(path), "reader": reader} for reader in readers]

    def copy(self) -> Path:
        """A copy of the sound checkpoint."""
        target = self.work / f"ours_{len(list(self.work.iterdir()))}" / self.sound.name
        shutil.copytree(self.sound, target)
        return target

    def folder(self) -> Path:
        target = self.work / f"folder_{len(list(self.work.iterdir()))}"
        target.mkdir()
        return target

    def add_ours(self, everything: bool) -> None:
        for name, make in corpus.OURS.items():
            step = self.copy()
            make(step, self.marker)
            corpus.seal(step)
            commands = [reader for reader, names in _FIRST_OF_A_KIND.items() if everything or name in names]
            self.add(name, step, "weights", *commands)
        for name, make in corpus.TOKENIZERS.items():
            step = self.copy()
            make(step, self.marker)
            corpus.seal(step)
            self.add(name, step, "generate", *(["train"] if everything else []))

    def add_foreign(self) -> None:
        for name, make in corpus.MEGATRON.items():
            folder = self.folder()
            corpus.megatron_lm(folder, self.sound, make(self.marker))
            self.add(name, folder, "from_megatron")
        for name, members in corpus.NEMO.items():
            path = self.folder() / "model.nemo"
            (self.work / "secret").write_text("secret")
            corpus.archive(path, members(self.marker))
            self.add(name, path, "from_megatron")
        for name, content in (("calls os.system", corpus.saved({"w": corpus.Touch(self.marker)})), ("script", None)):
            folder = self.folder()
            shutil.copyfile(ROOT / "nemo_llm/assets/tokenizers/demo/tokenizer.json", folder / "tokenizer.json")
            (folder / "config.json").write_text(json.dumps(LLAMA))
            (folder / "pytorch_model.bin").write_bytes(content or (self.work / "script.pt").read_bytes())
            self.add(f"pytorch_model.bin: {name}", folder, "from_hf")
        folder = self.folder()
        corpus.remote_code(folder, self.marker)
        shutil.copyfile(ROOT / "nemo_llm/assets/tokenizers/demo/tokenizer.json", folder / "tokenizer.json")
        self.add("a model of remote code", folder, "from_hf")

    def add_templates(self) -> None:
        evil = self.work / "evil_metric.py"
        evil.write_text(f"open({str(self.marker)!r}, 'w')\n")
        for number, text in enumerate(corpus.ESCAPES):
            source = text.replace("MARKER", str(self.marker))
            path = self.work / f"{number}.jinja"
            path.write_text(source)
            self.add(f"template {text}", path, "template", "chat_template")
            for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description"):
                self.add_task(f"task: {key} {text}", {key: source})
        for change in (
            {"metric_list": [{"metric": str(evil)}]},
            {"metric_list": [{"metric": str(evil), "hf_evaluate": True}]},
            {"use_prompt": str(evil)},
            {"process_docs": f"{evil}:f"},
            {"unsafe_code": True},
            {"dataset_kwargs": {"trust_remote_code": True}},
            {"class": str(evil)},
        ):
            self.add_task(f"task: {change}", change)

    def add_task(self, name: str, change: dict[str, Any]) -> None:
        path = self.work / f"task_{len(self.rows)}.yaml"
        text = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "output_type": "generate_until"}
        if "doc_to_choice" in change:
            text["output_type"] = "multiple_choice"
        path.write_text(json.dumps({**text, **change}))  # JSON is YAML
        self.add(name, path, "task")

    def run(self) -> Iterator[dict[str, Any]]:
        (self.work / "cases.json").write_text(json.dumps(self.rows))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.attack.guard", str(self.work)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self.work)
        assert done.returncode == 0, done.stdout + done.stderr
        for line in (self.work / "results.jsonl").read_text().splitlines():
            yield json.loads(line)


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    ranks.run(save_random_model, 1, str(folder), "gpt_tiny")
    return folder / "step_00000000"


@pytest.fixture(scope="module")
def results(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The work folder, and how each case ended: in one process, since its imports take longer than the cases."""
    cases = Cases(tmp_path_factory.mktemp("attack"), sound)
    cases.add("sound", sound, "weights", "generate", "train", "show", "to_hf")
    (cases.work / "sound.jinja").write_text("{{ text }} {% for e in examples %}{{ e.label }}{% endfor %}")
    cases.add("sound template", cases.work / "sound.jinja", "template")
    cases.add_ours(everything=False)
    cases.add_foreign()
    cases.add_templates()
    return cases.work, list(cases.run())


def _judge(work: Path, rows: list[dict[str, Any]]) -> None:
    wrong = []
    for row in rows:
        problems = [row["events"]] if row["events"] else []
        if row["code"] != 2:
            problems.append(f"code {row['code']}")
        if "Traceback" in row["said"] or not row["said"].strip():
            problems.append("no clear error")
        if "[y/N]" in row["said"]:
            problems.append("it asked")
        if problems:
            wrong.append(f"{row['name']}, {row['reader']}: {problems}\n{row['said'][-1500:]}")
    assert not wrong, f"{len(wrong)} of {len(rows)}:\n" + "\n\n".join(wrong)
    assert len(rows) > 40
    assert not [path for path in work.iterdir() if path.name in ("MARKER", "common.pt")]
    assert not (work.parent / "common.pt").exists()


def test_hostile_files_are_refused_and_run_nothing(results: tuple[Path, list[dict[str, Any]]]) -> None:
    work, rows = results
    _judge(work, [row for row in rows if not row["name"].startswith(("sound", "template", "task"))])


def test_hostile_templates_and_tasks_are_refused(results: tuple[Path, list[dict[str, Any]]]) -> None:
    pytest.importorskip("lm_eval")
    work, rows = results
    _judge(work, [row for row in rows if row["name"].startswith(("template", "task"))])


def test_sound_files_pass_under_the_same_hooks(results: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = [row for row in results[1] if row["name"].startswith("sound")]
    assert len(rows) == 6
    assert [row["code"] for row in rows] == [0] * len(rows), [row["said"] for row in rows if row["code"]]
    assert not any(row["events"] for row in rows), rows


@pytest.mark.slow
def test_every_command_refuses_every_hostile_checkpoint(sound: Path, tmp_path: Path) -> None:
    cases = Cases(tmp_path, sound)
    cases.add_ours(everything=True)
    _judge(cases.work, list(cases.run()))
