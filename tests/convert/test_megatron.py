"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo in, of Megatron-LM out; Megatron-Core's logits beside ours."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_llm.checkpoint.unpickle import Record, read_torch
from nemo_llm.convert.megatron_files import open_megatron
from nemo_llm.convert.nemo1_ranks import RankFiles
from nemo_llm.errors import CheckpointDamagedError, InputError
from nemo_llm.families.mcore import arguments_of_fields, fields_of_arguments, fields_of_section, section_of_fields
from tests.convert.megatron_world import (
    arguments_of,
    load_in_megatron,
    logits_of_ours,
    save_as_megatron,
)
from tests.convert.test_families import convert_with
from tests.ranks import RankPool


def _convert(source: str, target: str, input_: str, output: str) -> Any:
    return convert_with(source, target, Path(input_), Path(output)).gate


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "kind", "processes"),
    [
        ("llama", "megatron", 2),
        ("gpt", "nemo1", 1),
        ("swiglu", "nemo1", 2),
        ("gpt", "nemo1 stages", 2),
        # Each save by Megatron starts processes of its own, which import everything anew.
        pytest.param("mixture", "megatron", 1, marks=SLOW),
        pytest.param("llama", "nemo2", 1, marks=SLOW),
        pytest.param("llama", "megatron", 1, marks=SLOW),
        pytest.param("llama 3.1", "megatron", 1, marks=SLOW),
        pytest.param("gpt", "megatron", 2, marks=SLOW),
        pytest.param("llama", "bridge", 2, marks=SLOW),
    ],
)
def test_in_and_out_again(shape: str, kind: str, processes: int, tmp_path: Path, ranks: RankPool) -> None:
    layout = ("parallelism=tp2",) if processes == 2 else ()
    theirs, ours, back = (str(tmp_path / name) for name in ("theirs", "ours", "back"))
    ranks.run(save_as_megatron, processes, theirs, shape, kind, *layout)
    source = f"{theirs}/model.nemo" if kind.startswith("nemo1") else theirs
    (report,) = ranks.run(_convert, 1, "megatron", "nemo_llm", source, ours)
    assert report.passed
    expected = torch.load(Path(theirs) / "logits.pt")
    assert expected.abs().max() > 0.5
    (logits,) = ranks.run(logits_of_ours, 1, ours)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    ranks.run(_convert, 1, "nemo_llm", "megatron", ours, back)
    (logits,) = ranks.run(load_in_megatron, 1, back)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["llama", "llama 3.1", "gpt", "mixture"])
def test_arguments_survive_the_way_in_and_out(shape: str) -> None:
    section = section_of_fields(fields_of_arguments(arguments_of(shape)), "here")
    section |= {"norm_placement": "pre", "parallel_residual": False, "qk_layernorm_scope": "head", "layer_spec": None}
    section |= dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier"))
    section |= {"vocab_size": 131, "rotary_local_base": None}
    again = arguments_of_fields(fields_of_section(section))
    given = arguments_of(shape)
    ignored = {"padded_vocab_size", "lr", "add_qkv_bias", "num_query_groups", "kv_channels", "window_size"}
    assert {key: again[key] for key in again.keys() & given.keys() - ignored} == {
        key: given[key] for key in again.keys() & given.keys() - ignored
    }
    assert section_of_fields(fields_of_arguments(again), "again") == {
        key: section[key] for key in section_of_fields(fields_of_arguments(again), "again")
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not built"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
        ({"normalization": None}, "says nothing of normalization"),
    ],
)
def test_what_is_not_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        section_of_fields(fields_of_arguments({**arguments_of("llama"), **changes}), "here")


def test_missing_and_interleaved_ranks_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(2, 2)
    for name, state in (("tp_rank_00_pp_rank_000", {}), ("tp_rank_01_pp_rank_001", {})):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "model_weights.ckpt")
    with pytest.raises(InputError, match="missing: tp 1 pp 0, tp 0 pp 1"):
        RankFiles(tmp_path, 2, gated=False)
    only = tmp_path / "one" / "mp_rank_00"
    only.mkdir(parents=True)
    torch.save({"model0.decoder.layers.0.mlp.linear_fc1.weight": weight}, only / "model_weights.ckpt")
    with pytest.raises(InputError, match="interleaved"):
        RankFiles(tmp_path / "one", 2, gated=False)


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    for name in ("context", "weights"):
        (tmp_path / name).mkdir()
    config = {"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B", "num_layers": 2}
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump({"config": config}))
    with pytest.raises(InputError, match="GemmaConfig2B may do more"), open_megatron(tmp_path, None, tmp_path):
        pass


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint of Megatron-LM"), open_megatron(tmp_path, None, tmp_path):
        pass
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(InputError, match="iter_0000007"), open_megatron(tmp_path, None, tmp_path):
        pass


class _Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_of_anything_is_read_and_runs_nothing(tmp_path: Path) -> None:
    content = {"args": Namespace(num_layers=2, kind=_Harmful(tmp_path / "made")), "weight": torch.arange(3.0)}
    torch.save(content, tmp_path / "common.pt")
    read = read_torch(tmp_path / "common.pt", None)
    assert read["args"].state["num_layers"] == 2
    assert isinstance(read["args"].state["kind"], Record)
    assert torch.equal(read["weight"], content["weight"])
    assert not (tmp_path / "made").exists()
    whole = (tmp_path / "common.pt").read_bytes()
    (tmp_path / "common.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointDamagedError, match="damaged"):
        read_torch(tmp_path / "common.pt", None)
