"""tools/inspect_checkpoint.py on real checkpoints, whole and damaged."""

import errno
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_llm.checkpoint.folder import find_checkpoint, resolve_checkpoint
from nemo_llm.checkpoint.manifest import BLOCK_BYTES, BlockHasher, describe_file, verify
from nemo_llm.checkpoint.safe_load import check_safe
from nemo_llm.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, ExitCode
from nemo_llm.training.resume import _check_step
from tests.ranks import RankPool
from tests.training.test_resume import ZERO1, _train, flip_a_byte
from tools.inspect_checkpoint import main


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint at step 2, written by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    ranks.run(_train, 2, "gpt_tiny", (ZERO1,), str(folder), 2, False)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    found = find_checkpoint(tmp_path / "run")
    assert found is not None
    return found


def test_show_names_every_tensor_with_its_norm(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["show", str(run), "--norms"]) == 0
    output = capsys.readouterr().out
    assert "step 2, 16 samples" in output
    assert "decoder.final_layernorm.weight  float32 [128]  norm 11.3" in output
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" in output


def test_verify_and_diff(run: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(run)]) == 0
    assert main(["diff", str(run), str(copy)]) == 0
    assert "equal bit by bit" in capsys.readouterr().out
    file = max((copy / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    place = content.index(bytes(4096)) if bytes(4096) in content else len(content) // 2
    content[place] ^= 1
    file.write_bytes(bytes(content))
    assert main(["verify", str(copy)]) == 2
    assert file.name in capsys.readouterr().out


def test_diff_finds_the_first_tensor_and_says_how_it_differs(
    run: Path, ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ranks.run(_train, 1, "gpt_tiny", ("optim.lr=1e-3",), str(tmp_path), 2, False)
    assert main(["diff", str(run), str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert output.startswith("decoder.final_layernorm.weight: ")
    assert "largest difference" in output


def test_what_runs_code_is_refused(copy: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("evil",))

    check_safe(copy / "state")
    (copy / "state" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"builtins\.print"):
        check_safe(copy / "state")


def test_a_newer_format_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99, "version": "9.1.0"}))
    with pytest.raises(CheckpointError, match=r"format 99 by a newer version of nemo_llm \(9\.1\.0\)") as caught:
        verify(copy)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert main(["show", str(copy)]) == main(["verify", str(copy)]) == 2


def test_a_changed_manifest_is_noticed(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"bytes"', ' "bytes"', 1))
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json: damaged"):
        verify(copy)


@pytest.mark.parametrize("how", ["full", "sampled", "sizes"])
def test_truncated_and_missing_files_are_named(copy: Path, how: str) -> None:
    file = next((copy / "state").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointDamagedError, match=file.name):
        verify(copy, how)
    file.unlink()
    with pytest.raises(CheckpointDamagedError, match=f"{file.name}: missing"):
        verify(copy, how)
    assert len(content) > 1


def test_a_flipped_byte_is_named(copy: Path) -> None:
    flip_a_byte(copy / "training.json")
    with pytest.raises(CheckpointDamagedError, match=r"training\.json: damaged"):
        verify(copy)


def test_a_folder_without_a_checkpoint_says_what_is_there(copy: Path) -> None:
    (copy / "COMPLETE").unlink()
    with pytest.raises(CheckpointNotFoundError, match="step_00000002, none of them finished"):
        resolve_checkpoint(copy.parent.parent)
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        resolve_checkpoint(copy / "nowhere")


def test_hash_of_a_stream_is_that_of_the_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * (BLOCK_BYTES // 256) + b"tail"
    hasher = BlockHasher()
    for at in range(0, len(content), 1000003):
        hasher.update(content[at : at + 1000003])
    (tmp_path / "file").write_bytes(content)
    assert hasher.entry() == describe_file(tmp_path / "file")
    assert len(hasher.blocks) == 2


def test_a_file_that_cannot_be_read_is_damaged_and_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next((copy / "state").glob("*.distcp"))
    opened = Path.open

    def failing(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path == file:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointDamagedError, match=rf"{file.name}: damaged; it cannot be read: Input/output"):
        verify(copy)


def test_a_folder_of_another_step_than_its_name_is_refused(copy: Path) -> None:
    _check_step(copy)
    renamed = copy.rename(copy.with_name("step_00000099"))
    with pytest.raises(CheckpointDamagedError, match="holds step 2, and its name says step 99"):
        _check_step(renamed)
