"""FP8 products of the torch backend on CPU: rounding, gradients, and a short training run beside bf16."""

import inspect

import pytest
import torch

from tests.ranks import RankPool

RECIPE = ("precision=fp8_tensorwise", "model.transformer_impl=torch")


def _products() -> list[float]:
    """Relative errors (Frobenius) of output and both gradients against float64."""
    from nemo_llm.models.layers.fp8 import Fp8Product

    torch.manual_seed(1)
    x, weight = torch.randn(64, 48), torch.randn(32, 48) * 0.02
    seed = torch.randn(64, 32) * 1e-5
    results = []
    for function, dtype in (
        (lambda a, b: Fp8Product.apply(a, b, torch.float8_e5m2), torch.float32),
        (lambda a, b: a @ b.t(), torch.float64),
    ):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        output = function(a, b)
        results.append([output.detach(), *torch.autograd.grad((output * seed.to(dtype)).sum(), (a, b))])
    return [((ours - exact).norm() / exact.norm()).item() for ours, exact in zip(*results, strict=True)]


def test_products_are_as_near_as_three_and_two_bits_of_mantissa_allow(ranks: RankPool) -> None:
    (output, x_grad, weight_grad) = ranks.run(_products, 1)[0]
    assert 0.01 < output < 0.05  # E4M3: values are off by up to 1/16, evenly: 2.6% rms each
    assert 0.02 < x_grad < 0.10  # E5M2 gradients: up to 1/8
    assert 0.02 < weight_grad < 0.10


def _main_gradient() -> tuple[bool, float]:
    from nemo_llm.models.layers.fp8 import Fp8Product

    torch.manual_seed(2)
    x, weight = torch.randn(32, 16), torch.nn.Parameter(torch.randn(16, 16))
    weight.main_grad = torch.ones(16, 16)
    weight.grad_added_to_main_grad = False
    Fp8Product.apply(x, weight, torch.float8_e4m3fn).sum().backward()
    exact = 1 + x.sum(0).expand(16, 16)
    return weight.grad_added_to_main_grad, ((weight.main_grad - exact).norm() / exact.norm()).item()


def test_weight_gradient_is_added_to_megatrons_buffer(ranks: RankPool) -> None:
    announced, error = ranks.run(_main_gradient, 1)[0]
    assert announced
    assert error < 0.05


def _losses(overrides: tuple[str, ...]) -> list[float]:
    from tests.parity.layouts import train_losses

    return [row[0] for row in train_losses("gpt_tiny", overrides, ("trainer.accelerator=cpu",))]


def test_training_stays_near_bf16_and_is_not_bf16(ranks: RankPool) -> None:
    fp8 = ranks.run(_losses, 1, RECIPE)[0]
    bf16 = ranks.run(_losses, 1, ("precision=bf16", "model.transformer_impl=torch"))[0]
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, rel=0.01)


def test_pytorchs_private_product_is_there() -> None:
    assert "use_fast_accum" in str(torch.ops.aten._scaled_mm.default._schema)
    assert inspect.isbuiltin(torch._scaled_mm)
