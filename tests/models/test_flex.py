"""FlexAttention under our masks against the matrix of scores: values, since on CPU it has no gradients.

Gradients are compared on a GPU: ``python -m tests.models.kernel_checks cuda``.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_llm.models.layers import flex_attention
from nemo_llm.models.layers.attention import CoreAttention
from tests.models.kernel_checks import dense
from tests.ranks import RankPool

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 60 + [2] * 135, [0] * 130 + [1] * 1 + [2] * 69])


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(("sq", "sk"), [(200, 200), (64, 150)])
def test_equals_the_definition(
    documents: torch.Tensor | None, window: int | None, cap: float | None, sq: int, sk: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, sq, 16, generator=generator)
    k, v = (torch.randn(2, 2, sk, 16, generator=generator) for _ in range(2))
    ours = flex_attention.attend((q, k, v), documents, window, (0.3, cap))
    assert torch.allclose(ours.double(), dense((q, k, v), documents, window, (0.3, cap)), atol=2e-6)


def test_a_mask_is_made_once_and_anew_for_other_documents() -> None:
    tensors = tuple(torch.randn(2, 2, 200, 16) for _ in range(3))
    documents = DOCUMENTS.clone()

    def error() -> float:
        ours = flex_attention.attend(tensors, documents, None, (0.25, None))
        return float((ours - dense(tensors, documents, None, (0.25, None))).abs().max())

    assert error() < 2e-6
    made = flex_attention._block_mask.cache_info().misses
    assert error() < 2e-6
    assert flex_attention._block_mask.cache_info().misses == made
    documents[0, 50:] = 7  # written to, as a buffer of batches would be
    assert error() < 2e-6
    assert flex_attention._block_mask.cache_info().misses == made + 1
    for number in range(20):
        flex_attention.attend(tensors, documents + number, None, (0.25, None))
    assert flex_attention._block_mask.cache_info().misses == made + 21
    assert flex_attention._block_mask.cache_info().currsize <= flex_attention._KEPT_MASKS


def test_other_documents_compile_nothing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention import flex_attention as torch_flex

    counter = CompileCounterWithBackend("aot_eager")
    attention = torch.compile(torch_flex.flex_attention, dynamic=False, backend=counter)
    make = torch.compile(torch_flex.create_block_mask, dynamic=False, backend=counter)
    tensors = tuple(torch.randn(2, 2, 200, 16) for _ in range(3))
    for number in range(3):
        documents = DOCUMENTS.roll(number, 0) * (number + 1)
        mask = make(flex_attention._seen(documents, None, 0), 2, None, 200, 200, device="cpu")
        ours = attention(*tensors, block_mask=mask, scale=0.25)
        assert torch.allclose(ours.double(), dense(tensors, documents, None, (0.25, None)), atol=2e-6)
        assert counter.frame_count == 2


def core(window: int | None = None, cap: float | None = None, **others: Any) -> CoreAttention:
    """Attention over samples of 64 tokens."""
    settings = {"cp": 1, "flex_length": 64} | others
    config = SimpleNamespace(
        kv_channels=16,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
    )
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: settings["cp"]))
    return CoreAttention(config, 1, pg_collection=groups, logit_softcapping=cap, flex_length=settings["flex_length"])


def test_a_failure_names_the_way_out(monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(flex_attention, "flex_attention", fail)
    tensors = tuple(torch.randn(1, heads, 32, 16) for heads in (4, 2, 2))
    with pytest.raises(RuntimeError, match="shared memory") as caught:
        flex_attention.attend(tensors, None, 8, (1.0, None))
    assert "performance.flex_attention=false" in caught.value.__notes__[0]


WINDOW, PLAIN = False, True


@pytest.mark.parametrize(
    ("attention", "length", "documents", "plain", "taken"),
    [
        (core(), 64, None, PLAIN, False),  # cuDNN's or FlashAttention's
        (core(), 64, torch.int32, False, True),
        (core(), 64, None, WINDOW, True),
        (core(cap=5.0), 64, None, PLAIN, True),
        (core(cap=5.0), 50, None, PLAIN, False),  # a prompt
        (core(cp=2), 48, None, WINDOW, True),  # a chunk of a context-parallel rank sees three of four
        (core(cp=2), 50, None, WINDOW, False),
        (core(flex_length=None), 64, None, WINDOW, False),
        (core(), 64, torch.bool, False, False),  # a mask that is ready
    ],
)
def test_flex_is_for_masks_of_training(
    attention: CoreAttention, length: int, documents: torch.dtype | None, plain: bool, taken: bool
) -> None:
    # A machine without CUDA has no tensor there: this is what is asked of one.
    query: Any = SimpleNamespace(is_cuda=True, shape=(2, 4, length, 16))
    mask = None if documents is None else torch.zeros(2, length, dtype=documents)
    assert attention._takes_flex(query, length, mask, plain) == taken
    query.is_cuda = False
    assert not attention._takes_flex(query, length, mask, plain)


def _asked_for(options: list[str]) -> tuple[list[tuple], list[tuple]]:
    """What a training step asks of `flex_attention.attend`, and what is compiled ahead, as a GPU would do both."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.models.warm_kernels import run_flex
    from nemo_llm.parallel.runtime import start_runtime
    from nemo_llm.training.setup import build_training_run
    from nemo_llm.training.step import train_step

    calls: set[tuple] = set()

    def attend(tensors, documents, window, rule):
        numbers = None if documents is None else (tuple(documents.shape), str(documents.dtype))
        shapes = tuple((tuple(x.shape), x.stride(), str(x.dtype), x.requires_grad) for x in tensors)
        calls.add((shapes, numbers, window, rule))
        return dense(tensors, documents, window, rule).to(tensors[0].dtype)

    cfg = compose(
        [*options, "trainer.accelerator=cpu", "exp_manager.enabled=false", "data.seq_length=64", "precision=bf16",
         "trainer.global_batch_size=2", "trainer.micro_batch_size=2", "performance.fused_kernels=false",
         "performance.fused_rope=false", "performance.fused_linear_cross_entropy=false"]
    )  # fmt: skip
    run = build_training_run(cfg, start_runtime(cfg.runtime_setting))
    saved = flex_attention.attend, CoreAttention._takes_flex
    flex_attention.attend = attend
    CoreAttention._takes_flex = lambda self, q, *others: saved[1](self, SimpleNamespace(is_cuda=True), *others)
    try:
        train_step(run)
        asked = sorted(calls, key=str)
        calls.clear()
        run_flex(cfg.model_setting, {"dtype": torch.bfloat16, "device": run.runtime.device})
        return asked, sorted(calls, key=str)
    finally:
        flex_attention.attend, CoreAttention._takes_flex = saved


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (["+model=gpt_tiny"], 0),
        (["+model=gpt_tiny", "data.reset_attention_mask=true"], 1),
        (["+model=gpt_tiny", "model.window_size=20"], 1),
        (["+model=gpt_tiny", "model.window_size=20", "model.window_attn_skip_freq=2"], 1),
        (["+model=gpt_tiny", "model.window_size=20", "model.window_attn_skip_freq=2",
          "data.reset_attention_mask=true"], 2),
        (["+model=gemma2_2b", "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=64",
          "model.kv_channels=16", "model.window_size=20", "model.vocab_size=null"], 2),
    ],
)  # fmt: skip
def test_what_a_step_asks_for_is_compiled_ahead(ranks: RankPool, options: list[str], kinds: int) -> None:
    asked, ahead = ranks.run(_asked_for, 1, options)[0]
    assert len(asked) == kinds
    assert asked == ahead


def test_a_window_that_is_never_left_is_none() -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(64, 2, 4, 16), torch.randn(64, 2, 2, 16), torch.randn(64, 2, 2, 16)
    assert torch.equal(core(window=64)._attend(q, k, v, None), core()._attend(q, k, v, None))
    assert not torch.allclose(core(window=63)._attend(q, k, v, None)[-1], core()._attend(q, k, v, None)[-1])
