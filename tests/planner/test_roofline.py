"""The floor under a step counts what the planner counts, and bytes that can be checked by hand."""

from benchmarks.roofline import parts_of_step
from nemo_llm.config.compose.load import compose
from nemo_llm.planner.flops import flops_per_token
from nemo_llm.planner.parameters import count_parameters


def _parts(*overrides: str, gpus: int = 1) -> dict[str, tuple[float, float]]:
    return {part.name: (part.flops, part.bytes) for part in parts_of_step(compose(list(overrides)), gpus, 50304)}


def test_operations_are_the_planners() -> None:
    cfg = compose(["+model=gpt_1b", "trainer.global_batch_size=4", "trainer.micro_batch_size=2"])
    tokens = 4 * cfg.data.seq_length
    parts = _parts("+model=gpt_1b", "trainer.global_batch_size=4", "trainer.micro_batch_size=2")
    counted = parts["matrix products"][0] + parts["attention"][0] * 12 / 14
    assert counted == flops_per_token(cfg.model, cfg.data.seq_length, 50304).causal * tokens


def test_bytes_of_elementwise_passes() -> None:
    overrides = ("+model=llama3_1b", "trainer.global_batch_size=2", "trainer.micro_batch_size=1")
    parts, tokens = _parts(*overrides), 2 * 4096
    # SwiGLU of 16 layers: 2f in, f out; then the gradient and 2f in, 2f out; two bytes each.
    assert parts["activation of the MLP"][1] == 16 * tokens * 8192 * (2 + 1 + 1 + 2 + 2) * 2
    # 32 query heads and twice 8 others of 64 channels are read and written, both ways.
    assert parts["split and rotation of QKV"][1] == 16 * tokens * 48 * 64 * 2 * 2 * 2
    assert parts["loss from logits"][1] == tokens * 50304 * 2 * 2
    assert parts["tokens to experts and back"] == (0.0, 0.0)


def test_the_optimizer_is_shared_by_gpus() -> None:
    overrides = ("+model=gpt_1b", "trainer.global_batch_size=4", "trainer.micro_batch_size=2")
    total = count_parameters(compose(list(overrides)).model, 50304).total
    one, two = (_parts(*overrides, gpus=gpus) for gpus in (1, 2))
    assert one["AdamW"][1] == 30 * total == 2 * two["AdamW"][1]
    assert two["norm of gradients, and zeroing"][1] == 4 * total * 1.5
    assert two["matrix products"][0] == one["matrix products"][0] / 2
