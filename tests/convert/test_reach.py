"""The gate reads texts that are longer than every length of the configuration, or says which it did not read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_llm.convert.reach import Reach
from nemo_llm.errors import NemoLlmError
from tests.convert.cases import CASES, make_hf_model
from tests.convert.test_families import convert_with
from tests.ranks import RankPool

MISTRAL = next(case for case in CASES if case.name == "mistral")
DYNAMIC = next(case for case in CASES if case.name == "llama rope dynamic")
GEMMA2 = next(case for case in CASES if case.name == "gemma2")


def make(folder: Path, case: Any, drop: tuple[str, ...] = (), **settings: Any) -> Path:
    make_hf_model(dataclasses.replace(case, settings={**case.settings, **settings}), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return folder


def _there_and_back(folder: str) -> list[Any]:
    ways = (("hf", "nemo_llm", "hf", "ours"), ("nemo_llm", "hf", "ours", "back"))
    return [
        convert_with(source, target, Path(folder) / input_, Path(folder) / output).gate
        for source, target, input_, output in ways
    ]


def test_a_missing_window_is_that_of_transformers_and_is_looked_at(tmp_path: Path, ranks: RankPool) -> None:
    """Mistral's class has a window of 4,096 where config.json says none."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    make(tmp_path / "hf", MISTRAL, ("sliding_window",), sliding_window=4096, **small)
    (reports,) = ranks.run(_there_and_back, 1, str(tmp_path))
    for report in reports:
        assert report.passed
        assert "a text of 4,352 tokens, longer than model.window_size=4096, sliding_window=4096" in str(report)
        assert not report.not_seen
    assert json.loads((tmp_path / "back" / "config.json").read_text())["sliding_window"] == 4096


def test_dynamic_scaling_begins_at_the_length_of_the_model(tmp_path: Path, ranks: RankPool) -> None:
    """transformers does not read the original length for this type."""
    rope = {**DYNAMIC.settings["rope_parameters"], "original_max_position_embeddings": 16}
    make(tmp_path / "hf", DYNAMIC, max_position_embeddings=100, rope_parameters=rope)
    (reports,) = ranks.run(_there_and_back, 1, str(tmp_path))
    for report in reports:
        assert "a text of 132 tokens, longer than max_position_embeddings=100" in str(report)


def _convert_damaged(folder: str, damage: str) -> list[str]:
    """Both ways, each with a table that has lost something which a short text does not show."""
    from nemo_llm.families import registry

    answers = []
    decode, encode = registry.model_section, registry.hf_config

    def decoded(config: Any, where: str) -> Any:
        section = decode(config, where)
        if damage == "rope":
            section["rope_scaling"]["original_max_position_embeddings"] += 30
            return section
        return {**section, damage: None}

    def encoded(family: Any, model: Any) -> Any:
        config = encode(family, model)
        return config | (
            {"rope_scaling": None} if damage == "rope" else {"sliding_window": config["sliding_window"] + 40}
        )

    from nemo_llm.config.compose import from_folder
    from nemo_llm.convert import hf

    for patched in (True, False):
        from_folder.model_section = decoded if patched else decode
        hf.hf_config = encode if patched else encoded
        way = ("hf", "nemo_llm", "hf", "ours") if patched else ("nemo_llm", "hf", "right", "back")
        try:
            if not patched:
                convert_with("hf", "nemo_llm", Path(folder) / "hf", Path(folder) / "right")
            convert_with(way[0], way[1], Path(folder) / way[2], Path(folder) / way[3])
            answers.append("converted")
        except NemoLlmError as error:
            answers.append(str(error))
        finally:
            from_folder.model_section, hf.hf_config = decode, encode
    return answers


@pytest.mark.parametrize(
    ("case", "settings", "damage", "seen"),
    [
        (MISTRAL, {"sliding_window": 200}, "window_size", "232 tokens"),
        (
            GEMMA2,
            {"sliding_window": 300, "max_position_embeddings": 512},
            "window_attn_skip_freq",
            "tokens, longer than",
        ),
        (DYNAMIC, {"max_position_embeddings": 120}, "rope", "tokens, longer than"),
    ],
    ids=("window", "windows on all layers", "dynamic"),
)
def test_what_a_short_text_hides_fails_the_conversion(
    case: Any, settings: dict[str, Any], damage: str, seen: str, tmp_path: Path, ranks: RankPool
) -> None:
    make(tmp_path / "hf", case, **settings)
    ((into, out),) = ranks.run(_convert_damaged, 1, str(tmp_path), damage)
    assert "different logits" in into
    assert seen in into
    assert "different logits" in out
    assert "longer than" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "right"]


MODEL: dict[str, Any] = {
    "num_layers": 8,
    "num_attention_heads": 4,
    "window_size": None,
    "window_attn_skip_freq": None,
    "rope_scaling": None,
    "position_embedding_type": "rope",
    "max_position_embeddings": 256,
}


def test_lengths_that_no_memory_holds_are_named() -> None:
    reach = Reach.of({**MODEL, "window_size": 1 << 24}, {"sliding_window": 300})
    length, read, left = reach.plan(96)
    assert (length, [str(threshold) for threshold in read]) == (332, ["sliding_window=300"])
    assert [str(threshold) for threshold in left] == ["model.window_size=16777216"]
    assert Reach.of({**MODEL, "window_size": 90}).plan(96) == (None, [], [])


def test_learned_positions_end_where_they_end() -> None:
    reach = Reach.of({**MODEL, "window_size": 250, "position_embedding_type": "learned_absolute"})
    length, read, left = reach.plan(96)
    assert (length, read, len(left)) == (None, [], 1)


def test_the_first_layers_have_every_kind_of_attention() -> None:
    assert Reach.of(MODEL).layers == 1
    assert Reach.of({**MODEL, "window_size": 9, "window_attn_skip_freq": 6}).layers == 6
    assert Reach.of(MODEL, {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 5}).layers == 4


def test_lengths_of_scalings() -> None:
    config = {"max_position_embeddings": 512, "rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}
    assert [str(found) for found in Reach.of(MODEL, config).thresholds] == ["max_position_embeddings=512"]
    scaling = {"type": "llama3", "original_max_position_embeddings": 8192}
    length, _, left = Reach.of({**MODEL, "num_attention_heads": 32, "rope_scaling": scaling}).plan(96)
    assert length is None
    assert str(left[0]) == "model.rope_scaling.original_max_position_embeddings=8192"
