"""FlexAttention under our masks against the matrix of scores: values, since on CPU it has no gradients.

Gradients are compared on a GPU: ``python -m tests.models.kernel_checks cuda``.
"""

import pytest
import torch
import torch.nn.functional as F

from nemo_llm.models import flex

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 60 + [2] * 135, [0] * 130 + [1] * 1 + [2] * 69])


def dense(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    documents: torch.Tensor | None,
    window: int | None,
    rule: tuple[float, float | None],
) -> torch.Tensor:
    """As `flex.attend`, in float64 and by the definition."""
    q, k, v = (x.double() for x in tensors)
    (scale, cap), sq, sk = rule, q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    query, key = torch.arange(sk - sq, sk, device=q.device)[:, None], torch.arange(sk, device=q.device)[None]
    seen = (key <= query)[None, None]
    if window is not None:
        seen = seen & (key > query - window)
    if documents is not None:
        seen = seen & (documents[:, None, sk - sq : sk, None] == documents[:, None, None, :sk])
    return F.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v


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
    ours = flex.attend((q, k, v), documents, window, (0.3, cap))
    assert torch.allclose(ours.double(), dense((q, k, v), documents, window, (0.3, cap)), atol=2e-6)


def test_a_mask_is_made_once_and_anew_for_other_documents() -> None:
    tensors = tuple(torch.randn(2, 2, 200, 16) for _ in range(3))
    documents = DOCUMENTS.clone()

    def error() -> float:
        ours = flex.attend(tensors, documents, None, (0.25, None))
        return float((ours - dense(tensors, documents, None, (0.25, None))).abs().max())

    assert error() < 2e-6
    mask = flex._block_mask(documents, None, (200, 200), torch.device("cpu"))
    assert flex._block_mask(documents, None, (200, 200), torch.device("cpu")) is mask
    documents[0, 50:] = 7  # written to, as a buffer of batches would be
    assert error() < 2e-6
    assert flex._block_mask(documents, None, (200, 200), torch.device("cpu")) is not mask
    for number in range(20):
        flex._block_mask(documents + number, None, (200, 200), torch.device("cpu"))
    assert len(flex._masks) <= flex._KEPT_MASKS


def test_other_documents_compile_nothing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counter = CompileCounterWithBackend("aot_eager")
    attention = torch.compile(flex_attention, dynamic=False, backend=counter)
    make = torch.compile(create_block_mask, dynamic=False, backend=counter)
    tensors = tuple(torch.randn(2, 2, 200, 16) for _ in range(3))
    for number in range(3):
        documents = DOCUMENTS.roll(number, 0) * (number + 1)
        mask = make(flex._seen(documents, None, 0), 2, None, 200, 200, device="cpu")
        ours = attention(*tensors, block_mask=mask, scale=0.25)
        assert torch.allclose(ours.double(), dense(tensors, documents, None, (0.25, None)), atol=2e-6)
        assert counter.frame_count == 2
