"""LoRA beside weights in 4 bits: as beside weights that hold what the 4 bits say, at a fraction of the memory."""

from pathlib import Path

import pytest

from nemo_llm.config.checks import check
from nemo_llm.config.compose.load import compose
from nemo_llm.errors import ConfigError
from tests.ranks import RankPool

RUN = (
    "+model=gpt_tiny", "data=mock", "data.seq_length=64", "trainer.global_batch_size=2", "trainer.micro_batch_size=2",
    "trainer.accelerator=cpu", "exp_manager.enabled=false", "sample.enabled=false", "peft=lora", "peft.rank=4",
    "optim.lr=1e-2", "optim.sched.warmup_steps=1",
)  # fmt: skip
FOUR_BITS = "peft.base_weights=nf4"


def compare(steps: int) -> dict[str, list]:
    """Losses and gradient norms with 4 bits, with what they say in whole numbers, and with the weights themselves."""
    import torch
    from megatron.core.utils import get_model_config, unwrap_model

    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.peft.linear import find_linears
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    configs = {"nf4": compose([*RUN, FOUR_BITS]), "said": compose(list(RUN)), "full": compose(list(RUN))}
    runtime = start_runtime(configs["nf4"].runtime_setting)
    runs = {name: build_training_run(cfg, runtime) for name, cfg in configs.items()}
    places = {}
    for name, run in runs.items():
        whole = unwrap_model(run.model[0])
        places[name] = find_linears(whole, get_model_config(whole), runtime.groups)
    with torch.no_grad():
        for ours, theirs in zip(places["nf4"], places["said"], strict=True):
            theirs.linear.weight.copy_(ours.linear.weight)
    found: dict[str, list] = {
        name: [(result.loss, result.grad_norm) for result in (train_step(run) for _ in range(steps))]
        for name, run in runs.items()
    }
    packed = sum(place.linear.packed.numel() for place in places["nf4"])
    found["bytes"] = [packed, sum(place.linear.weight.numel() for place in places["full"])]
    found["named"] = [name for name, _ in runs["nf4"].model[0].named_parameters() if "linear" in name]
    return found


def save_and_go_on(folder: str) -> list[list[float]]:
    """Losses of four steps, and of two, a save, a load and two more."""
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.run.folder import to_plain, write_config
    from nemo_llm.training.checkpoint import load_checkpoint, save_checkpoint
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    cfg = compose([*RUN, FOUR_BITS])
    runtime = start_runtime(cfg.runtime_setting)
    whole = build_training_run(cfg, runtime)
    losses = [[train_step(whole).loss for _ in range(4)]]
    first, second = (build_training_run(cfg, runtime) for _ in range(2))
    first.run_dir = Path(folder)
    write_config(first.run_dir, to_plain(cfg))
    losses.append([train_step(first).loss for _ in range(2)])
    load_checkpoint(second, save_checkpoint(first))
    losses[1] += [train_step(second).loss for _ in range(2)]
    return losses


def test_four_bits_train_as_the_weights_that_they_stand_for(ranks: RankPool) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes has no package for this platform")
    found = ranks.run(compare, 1, 3)[0]
    for got, wanted in zip(found["nf4"], found["said"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    # Four bits are near the weights, and not the weights.
    assert found["nf4"][0] != found["full"][0]
    assert found["nf4"][0][0] == pytest.approx(found["full"][0][0], rel=0.02)
    packed, elements = found["bytes"]
    assert packed * 2 == elements
    assert found["named"], "nothing is trained"
    assert all(".adapter." in name for name in found["named"]), found["named"]


def test_a_run_with_four_bits_goes_on_bit_by_bit(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes has no package for this platform")
    whole, resumed = ranks.run(save_and_go_on, 1, str(tmp_path))[0]
    assert resumed == whole


@pytest.mark.parametrize(
    ("overrides", "processes", "named"),
    [
        (["parallelism.tensor_model_parallel_size=2"], 2, "parallelism.tensor_model_parallel_size"),
        (["precision=fp8_tensorwise"], 1, "precision.fp8"),
    ],
)
def test_what_four_bits_cannot_do_is_refused(overrides: list[str], processes: int, named: str) -> None:
    with pytest.raises(ConfigError, match="nf4") as caught:
        check(compose([*RUN, FOUR_BITS, *overrides]), processes)
    assert named in str(caught.value)
