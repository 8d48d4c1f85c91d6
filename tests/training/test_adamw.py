"""FusedAdamW against PyTorch's AdamW."""

import pytest
import torch

from nemo_llm.optim.adamw import FusedAdamW


def test_equals_pytorch_over_many_steps() -> None:
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(3)]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = FusedAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 20


def test_refuses_what_it_does_not_do() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="adam_w_mode"):
        FusedAdamW([parameter], adam_w_mode=False)
