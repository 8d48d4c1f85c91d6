"""A conversion that is killed leaves nothing that looks finished, and the same command goes on from where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemo_llm.checkpoint.folder import temporary_of, verify
from nemo_llm.convert.hf_files import HfReader
from tests.convert.cases import CASES, make_hf_model
from tests.convert.test_bad_input import run

ROOT = Path(__file__).resolve().parents[2]

# The process kills itself as a job is killed, in the middle of writing its n-th tensor.
KILLED = """
import os, signal, sys
import torch
from nemo_llm.checkpoint import state_files
from nemo_llm.convert import hf_files

def dying(function, which):
    count = 0
    def write(*arguments, **settings):
        nonlocal count
        count += 1
        if count == which:
            file = arguments[0] if which_file == 0 else arguments[1]
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)
    return write

which_file = int(sys.argv[3])
if which_file:
    state_files.torch.save = dying(torch.save, int(sys.argv[4]))
else:
    hf_files._write_all = dying(hf_files._write_all, int(sys.argv[4]))
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.convert.convert import convert
where = [f"input={sys.argv[1]}", f"output={sys.argv[2]}"]
convert(compose_tool("convert_checkpoint", ConvertConfig, sys.argv[5:] + where))
"""


def _killed(source: Path, output: Path, way: tuple[str, str], tensor: int) -> None:
    arguments = [f"source_format={way[0]}", f"target_format={way[1]}", "verify=false"]
    to_ours = way[1] == "nemo_llm"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, source, output, int(to_ours), tensor, *arguments]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    make_hf_model(CASES[0], hf)
    whole = run(hf, tmp_path / "whole").output
    _killed(hf, ours, ("hf", "nemo_llm"), 9)
    assert not ours.exists()
    data = temporary_of(ours) / "state" / "__0_0.distcp"
    before = data.stat()
    read: list[str] = []
    original = HfReader.read
    monkeypatch.setattr(HfReader, "read", lambda self, name: (read.append(name), original(self, name))[1])
    run(hf, ours)
    assert verify(ours, "full") > 0
    assert (ours / "state" / "__0_0.distcp").stat().st_ino == before.st_ino
    assert "model.embed_tokens.weight" not in read  # written before the kill
    assert "model.layers.1.mlp.down_proj.weight" in read
    for name in ("__0_0.distcp", ".metadata"):
        assert (ours / "state" / name).read_bytes() == (whole / "state" / name).read_bytes()
    _killed(ours, back, ("nemo_llm", "hf"), 9)
    assert not back.exists()
    inode = (temporary_of(back) / "model.safetensors").stat().st_ino
    run(ours, back, way=("nemo_llm", "hf"))
    assert (back / "model.safetensors").stat().st_ino == inode
    with HfReader(hf) as expected, HfReader(back) as found:
        assert expected.infos == found.infos
        assert all(torch.equal(original(expected, name), original(found, name)) for name in expected.infos)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "ours", "whole"]


def test_another_input_begins_anew(tmp_path: Path) -> None:
    hf, ours = tmp_path / "hf", tmp_path / "ours"
    make_hf_model(CASES[0], hf)
    _killed(hf, ours, ("hf", "nemo_llm"), 9)
    inode = (temporary_of(ours) / "state" / "__0_0.distcp").stat().st_ino
    os.utime(hf / "model.safetensors", (time.time() + 5, time.time() + 5))
    held = (temporary_of(ours) / "state" / "__0_0.distcp").open("rb")  # so that its inode is not used again
    run(hf, ours)
    assert (ours / "state" / "__0_0.distcp").stat().st_ino != inode
    held.close()
