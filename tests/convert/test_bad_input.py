"""What a conversion says when it cannot be done, and that it leaves nothing behind."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_llm.checkpoint.folder import read_config
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.convert import write_checkpoint
from nemo_llm.convert.convert import convert
from nemo_llm.convert.hf import compare_folders
from nemo_llm.convert.hf_files import HfReader
from nemo_llm.convert.logit_check import GateSettings, Outputs, judge
from nemo_llm.convert.mapping import Mapped
from nemo_llm.convert.write_checkpoint import choose_layers
from nemo_llm.errors import CheckpointError, InputError
from nemo_llm.families.registry import FAMILIES
from tests.convert.cases import CASES, make_hf_model
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    make_hf_model(CASES[0], folder)
    return folder


@pytest.fixture
def hf(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "hf"))


def run(source: Path, output: Path, *more: str, way: tuple[str, str] = ("hf", "nemo_llm")) -> Any:
    arguments = [f"source_format={way[0]}", f"target_format={way[1]}", f"input={source}", f"output={output}"]
    return convert(compose_tool("convert_checkpoint", ConvertConfig, [*arguments, "verify=false", *more]))


def assert_refused(source: Path, output: Path, words: list[str], *more: str, **settings: Any) -> None:
    before = sorted(path.name for path in output.parent.iterdir())
    with pytest.raises((InputError, CheckpointError)) as caught:
        run(source, output, *more, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert sorted(path.name for path in output.parent.iterdir()) == before


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_unexpected_tensors_are_listed_with_the_nearest_name(hf: Path, tmp_path: Path) -> None:
    def rename(tensors: dict) -> None:
        tensors["model.layers.1.self_attn.k_project.weight"] = tensors.pop("model.layers.1.self_attn.k_proj.weight")

    change_tensors(hf, rename)
    words = [
        "missing: model.layers.1.self_attn.k_proj.weight [16, 32] (nearest there: model.layers.1.self_attn.k_project",
        "unexpected: model.layers.1.self_attn.k_project.weight",
    ]
    assert_refused(hf, tmp_path / "out", words)


def test_mis_shaped_tensor(hf: Path, tmp_path: Path) -> None:
    change_tensors(hf, lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}))
    assert_refused(hf, tmp_path / "out", ["model.norm.weight is [33]", "makes it [32]"])


def test_wrong_family(hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert_refused(hf, tmp_path / "out", ["'mamba'", "llama, mistral"])


def test_another_known_family_is_told_by_its_tensors(hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    assert_refused(hf, tmp_path / "out", ["missing: model.layers.0.self_attn.q_proj.bias"])


def test_truncated_shard(hf: Path, tmp_path: Path) -> None:
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[:-100])
    assert_refused(hf, tmp_path / "out", ["model.safetensors", "truncated"])


def test_missing_shard(hf: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(hf, tmp_path / "out", ["model-00001-of-00002.safetensors", "missing"])


def test_pickled_weights_are_not_read(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    torch.save(tensors, hf / "pytorch_model.bin")
    assert_refused(hf, tmp_path / "out", ["no safetensors", "pytorch_model.bin", "allow_pickle=true"])
    ours = run(hf, tmp_path / "out", "allow_pickle=true").output
    back = run(ours, tmp_path / "back", way=("nemo_llm", "hf")).output
    with HfReader(back) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    # A class of ours: Megatron lets paths be unpickled in any process where it has read a checkpoint.
    torch.save({"a": HfReader}, hf / "pytorch_model.bin")
    assert_refused(hf, tmp_path / "other", ["pytorch_model.bin", "refused"], "allow_pickle=true")
    torch.save({"step": 3}, hf / "pytorch_model.bin")
    assert_refused(hf, tmp_path / "other", ["pytorch_model.bin", "step is a int"], "allow_pickle=true")


def test_existing_output_is_kept(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert_refused(hf, tmp_path / "out", ["exists already", "overwrite=true"])
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_input_is_not_overwritten(hf: Path) -> None:
    with pytest.raises(InputError, match="is the input as well"):
        run(hf, hf, "overwrite=true")
    assert (hf / "model.safetensors").exists()


def test_full_disk_is_seen_before_writing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A full disk cannot be had here: a need that no disk meets takes its place.
    monkeypatch.setattr(write_checkpoint, "SPARE_BYTES", 1 << 60)
    assert_refused(hf, tmp_path / "out", ["MiB free"])


def test_a_checkpoint_that_no_family_fits_is_refused(hf: Path, tmp_path: Path) -> None:
    ours = run(hf, tmp_path / "ours").output
    config = (ours / "config.yaml").read_text().replace("family: llama", "family: null")
    (ours / "config.yaml").write_text(config.replace("attn_logit_softcapping: null", "attn_logit_softcapping: 5.0"))
    words = ["no Hugging Face family", "attn_logit_softcapping=5.0"]
    assert_refused(ours, tmp_path / "out", words, way=("nemo_llm", "hf"))


def test_a_checkpoint_older_than_some_keys_is_exported(hf: Path, tmp_path: Path) -> None:
    ours = run(hf, tmp_path / "ours").output
    saved = yaml.safe_load((ours / "config.yaml").read_text())
    del saved["saved_by"]  # as before there were migrations
    for key in (
        "mla",
        "head",
        "rotary_local_base",
        "norm_placement",
        "parallel_residual",
        "qk_layernorm_scope",
        "family",
    ):
        del saved["model"][key]
    del saved["performance"]["flex_attention"], saved["trainer"]["check_memory"]
    (ours / "config.yaml").write_text(yaml.safe_dump(saved))
    back = run(ours, tmp_path / "back", way=("nemo_llm", "hf")).output
    with HfReader(hf) as before, HfReader(back) as after:
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.infos)


def test_dtype_and_shards(hf: Path, tmp_path: Path) -> None:
    ours = run(hf, tmp_path / "ours", "dtype=bf16").output
    back = run(ours, tmp_path / "back", "dtype=fp32", "max_shard_mib=1", way=("nemo_llm", "hf")).output
    with HfReader(hf) as before, HfReader(back) as after:
        for name in before.infos:
            assert torch.equal(before.read(name).bfloat16().float(), after.read(name))


def _convert_with_swapped_heads(source: str, output: str) -> str:
    """A table that is wrong in a way that shapes do not show: keys and values of every layer change places."""
    from nemo_llm.families import registry

    llama = registry.FAMILIES["llama"]
    rules = tuple(
        dataclasses.replace(rule, theirs=(rule.theirs[0], rule.theirs[2], rule.theirs[1]))
        if rule.ours.endswith("linear_qkv.weight")
        else rule
        for rule in llama.tensors
    )
    registry.FAMILIES["llama"] = dataclasses.replace(llama, tensors=rules)
    try:
        run(Path(source), Path(output), "verify=true")
    except CheckpointError as error:
        return str(error)
    finally:
        registry.FAMILIES["llama"] = llama
    return "converted"


def test_the_gate_names_the_first_layer_that_differs(hf: Path, tmp_path: Path, ranks: RankPool) -> None:
    (message,) = ranks.run(_convert_with_swapped_heads, 1, str(hf), str(tmp_path / "out"))
    assert "different logits; the first difference is after layer 0" in message
    assert "after the embedding: 0.0e+00" in message
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _convert_sampled(folder: str) -> tuple[list[int], str, str]:
    """A gate over three of the layers: of a right conversion and of two whose damage lies in and between them."""
    from nemo_llm.checkpoint.state_files import NativeReader, NativeWriter

    source, ours = Path(folder) / "hf", Path(folder) / "ours"
    sampled = run(source, ours, "verify=true", "verify_layers=3").gate.sampled_layers
    answers = []
    for layer in (sampled[1], sampled[1] + 1):
        damaged = Path(folder) / f"damaged_{layer}"
        shutil.copytree(ours, damaged)
        reader = NativeReader(ours / "state")
        with NativeWriter(damaged / "state") as writer:
            for link in Mapped.of(FAMILIES["llama"], read_config(ours)["model"]).links:
                tensor = reader.read(link.key, link.index)
                hit = link.index == (layer,) and link.key.endswith("linear_proj.weight")
                writer.write(link.key, link.index, link.axes, -tensor if hit else tensor)
        layers = "verify_layers=3"
        mapped = Mapped.of(FAMILIES["llama"], read_config(ours)["model"])
        arguments = ["source_format=hf", "target_format=nemo_llm", f"input={source}", f"output={damaged}", layers]
        cfg = compose_tool("convert_checkpoint", ConvertConfig, arguments)
        try:
            compare_folders(cfg, mapped, (source, damaged), damaged)
            answers.append("passed")
        except CheckpointError as error:
            answers.append(str(error))
    return sampled, *answers


def test_a_gate_over_a_sample_of_layers(tmp_path: Path, ranks: RankPool) -> None:
    make_hf_model(
        dataclasses.replace(CASES[0], settings={**CASES[0].settings, "num_hidden_layers": 7}), tmp_path / "hf"
    )
    ((sampled, within, beside),) = ranks.run(_convert_sampled, 1, str(tmp_path))
    assert sampled == [0, 3, 6]
    assert "different logits; the first difference is after layer 1" in within  # the second of the three
    assert "layers 0, 3, 6 alone" in within
    assert beside == "passed"  # a sample cannot see what lies between


def test_samples_keep_the_period_of_windows() -> None:
    assert choose_layers({"num_layers": 26, "window_attn_skip_freq": 2}, 6) == [0, 1, 12, 13, 24, 25]
    assert choose_layers({"num_layers": 3, "window_attn_skip_freq": None}, 6) == [0, 1, 2]


def test_figures_of_the_gate() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    other = torch.tensor(
        [
            [
                [0.0, 2.5],
                [0.0, 1.0],
            ]
        ]
    )
    report = judge(Outputs(logits, []), Outputs(other, []), GateSettings(2, 1e-4), is_text=False)
    assert not report.passed
    assert (report.max_difference, report.top1_agreement, report.largest_logit) == (1.0, 0.5, 2.0)
    kl = torch.nn.functional.kl_div(other.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum") / 2
    assert report.kl_divergence == pytest.approx(float(kl), rel=1e-5)
