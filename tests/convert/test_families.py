"""Every family: transformers' random model -> ours -> same logits and gradients on any layout -> back bit by bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_llm.checkpoint.folder import read_config
from nemo_llm.checkpoint.state_files import NativeReader
from nemo_llm.config.commands.convert import ConvertConfig
from nemo_llm.config.commands.data import compose_tool
from nemo_llm.config.compose.catalog import conf_dir, group_choices
from nemo_llm.config.compose.load import compose, to_dict
from nemo_llm.convert.convert import convert
from nemo_llm.convert.hf_files import HfReader
from nemo_llm.convert.mapping import Mapped
from nemo_llm.families.registry import FAMILIES, family_for
from tests.convert.cases import CASES, VOCABULARY, Case, make_hf_model
from tests.convert.parity import LAYOUTS, measure, run_theirs
from tests.ranks import RankPool

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Converted:
    case: Case
    hf: Path
    ours: Path
    logits: torch.Tensor
    grads: dict[str, torch.Tensor]


def convert_with(source: str, target: str, input_: Path, output: Path, *more: str) -> Any:
    arguments = [f"source_format={source}", f"target_format={target}", f"input='{input_}'", f"output='{output}'", *more]
    return convert(compose_tool("convert_checkpoint", ConvertConfig, arguments))


def _convert_case(case: Case, folder: Path, ranks: RankPool) -> Converted:
    model = make_hf_model(case, folder / "hf")
    # The gate runs on a rank of the pool: this process starts no world of its own.
    ranks.run(_import_and_export, 1, str(folder))
    return Converted(case, folder / "hf", folder / "ours", *run_theirs(model, folder / "grads"))


def _import_and_export(folder: str) -> None:
    convert_with("hf", "nemo_llm", Path(folder) / "hf", Path(folder) / "ours")
    convert_with("nemo_llm", "hf", Path(folder) / "ours", Path(folder) / "back")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Converted:
    """A model of each family, converted to our format and back, both through the gate."""
    return _convert_case(request.param, tmp_path_factory.mktemp("model"), ranks)


def test_back_is_bit_equal(converted: Converted) -> None:
    with HfReader(converted.hf) as before, HfReader(converted.hf.with_name("back")) as after:
        assert set(after.infos) == set(before.infos)
        for name in before.infos:
            assert torch.equal(before.read(name), after.read(name)), name


def largest_differences(converted: Converted, folder: Path) -> tuple[float, float]:
    """Of logits, and of gradients (relative to the largest of each tensor, or to 1 if that is less)."""
    logits = torch.load(folder / "logits.pt").detach()[..., :VOCABULARY]
    model = read_config(converted.ours)["model"]
    mapped = Mapped.of(FAMILIES[model["family"]], model)
    reader = NativeReader(folder / "state")
    worst = 0.0
    for link in mapped.links:
        theirs = mapped.to_ours(link, [converted.grads[name] for name in link.names])
        difference = (theirs - reader.read(link.key, link.index)).abs().max()
        worst = max(worst, float(difference / theirs.abs().max().clamp(min=1.0)))
    return float((logits - converted.logits).abs().max()), worst


@pytest.mark.parametrize("layout", ["one process", "TP2 x PP2", "EP2"])
def test_logits_and_gradients_are_those_of_transformers(
    converted: Converted, layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    if layout == "EP2" and not converted.case.experts:
        pytest.skip("no experts in this family")
    if layout != "one process" and not converted.case.is_quick:
        pytest.skip("in the slow tests")
    _compare_layout(converted, layout, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2 x PP2", "EP2"])
def test_logits_and_gradients_on_every_layout(
    converted: Converted, layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    if layout == "EP2" and not converted.case.experts:
        pytest.skip("no experts in this family")
    _compare_layout(converted, layout, ranks, tmp_path)


def _compare_layout(converted: Converted, layout: str, ranks: RankPool, tmp_path: Path) -> None:
    processes, overrides = LAYOUTS[layout]
    if converted.case.experts:
        overrides = (*overrides, "model.moe.moe_router_load_balancing_type=none")
    (tmp_path / "state").mkdir()
    ranks.run(measure, processes, str(converted.ours), str(tmp_path), overrides)
    logits, grads = largest_differences(converted, tmp_path)
    assert logits < TOLERANCE
    assert grads < TOLERANCE


MODELS_WITH_A_FAMILY = [
    name for name in group_choices([conf_dir()])["model"] if name not in ("from_hf", "from_checkpoint")
]


@pytest.mark.parametrize("name", MODELS_WITH_A_FAMILY)
def test_shipped_shapes_are_those_of_their_family(name: str) -> None:
    """``config.json`` of a shipped size, read again, is the same model section: its own family's where it names one."""
    section = to_dict(compose([f"+model={name}"]))["model"]
    if section["family"] is None:
        pytest.skip("an architecture of NeMo's or of this project")
    section["vocab_size"] = section["vocab_size"] or VOCABULARY
    assert family_for(section).model_type == section["family"]
