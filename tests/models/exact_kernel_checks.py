"""Kernels whose results are PyTorch's in every bit; cases of `kernel_checks`."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch


def routes_case(sizes: tuple[int, int, int], skew: str, device: str) -> float:
    """The order of rows and the tiles against those that PyTorch's sorts give; ``sizes`` = (T, k, E)."""
    from nemo_llm.kernels.expert_routes import routes_of_map, tiles_of_rows
    from nemo_llm.models.layers.experts import routes_of_choices

    tokens, choices, experts = sizes
    scores = torch.rand(tokens, experts)
    numbers = (scores if skew == "even" else scores[:1].expand_as(scores)).topk(choices, -1).indices.sort(-1).values
    wanted = routes_of_choices(numbers, experts)
    chosen = torch.zeros(tokens, experts, dtype=torch.bool, device=device).scatter_(1, numbers.to(device), True)
    *places, found = routes_of_map(chosen, choices)
    tiles = tiles_of_rows(places[0], wanted.tile_rows.numel(), wanted.rows_a_tile)
    values = (wanted.starts, wanted.tokens, wanted.places, wanted.rows_of_token, wanted.tile_experts, wanted.tile_rows)
    pairs = zip([*places, *tiles, found], [*values, numbers], strict=True)
    assert all(torch.equal(ours.cpu(), exact) for ours, exact in pairs)
    return 0.0


def adamw_case(sizes: list[int], half: torch.dtype | None, divisor: float, device: str) -> float:
    """Share of values that differ in any bit from PyTorch's fused AdamW on a GPU, or from its operations in NumPy.

    ``sizes``: elements of each tensor. Gradients and 16-bit weights lie one behind the other, as in Megatron's buffers.
    """
    from nemo_llm.kernels.adamw import AdamWPass, AdamWRule

    def apart(scale: float) -> list[torch.Tensor]:
        return [torch.randn(size, device=device) * scale for size in sizes]

    def together(dtype: torch.dtype) -> list[torch.Tensor]:
        return list((torch.randn(sum(sizes), device=device) * 1e-2).to(dtype).split(sizes))

    lists = [apart(1.0), together(torch.float32), apart(1e-2), [x.square() for x in apart(1e-2)]]
    halves = [] if half is None else [together(half)]
    one = AdamWPass([*lists, *halves])
    different = 0
    for step, decay in ((1, 0.1), (2, 0.0), (1000, 0.1)):
        rule = AdamWRule(step, 3e-4, (0.9, 0.95), 1e-8, decay, divisor)
        wanted = _adamw_of_pytorch(lists, rule) if device == "cuda" else _adamw_of_numpy(lists, rule)
        gradients = [x.clone() for x in lists[1]]
        one.run(rule)
        assert all(map(torch.equal, lists[1], gradients))
        pairs = zip([*lists[0], *lists[2], *lists[3]], [*wanted[0], *wanted[2], *wanted[3]], strict=True)
        different += sum(int((a != b).sum()) for a, b in pairs)
        for tensors in halves:
            assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(tensors, lists[0], strict=True))
    return different / (9 * sum(sizes))


def _adamw_of_pytorch(lists: list[list[torch.Tensor]], rule: Any) -> list[list[torch.Tensor]]:
    copies = [[x.clone() for x in tensors] for tensors in lists]
    steps = [torch.full((), float(rule.step), device="cuda")] * len(copies[0])
    torch._fused_adamw_(
        *copies, [], steps, amsgrad=False, lr=rule.lr, beta1=rule.betas[0], beta2=rule.betas[1], eps=rule.eps,
        weight_decay=rule.weight_decay, maximize=False, found_inf=None,
        grad_scale=torch.full((), rule.divisor, device="cuda"),
    )  # fmt: skip
    return copies


def _adamw_of_numpy(lists: list[list[torch.Tensor]], rule: Any) -> list[list[torch.Tensor]]:
    """In float32, each operation rounded: PyTorch's own roots and quotients on a CPU are not, and so differ."""
    divisor, lr, decay, eps = (np.float32(x) for x in (rule.divisor, rule.lr, rule.weight_decay, rule.eps))
    betas = torch.tensor(rule.betas, dtype=torch.float32)
    keep, keep_square = betas.numpy()
    correction, square_correction = (1.0 - betas ** torch.tensor(float(rule.step))).numpy()
    results = []
    for tensors in zip(*lists, strict=True):
        w, g, m, v = (x.numpy() for x in tensors)
        exact = g / divisor
        square = exact * exact
        w = w - lr * decay * w
        m = keep * m + (exact - keep * exact)
        v = keep_square * v + (square - keep_square * square)
        update = lr / correction * m / (np.sqrt(v) / np.sqrt(square_correction) + eps)
        results.append([torch.from_numpy(x) for x in (w - update, g, m, v)])
    return [list(tensors) for tensors in zip(*results, strict=True)]


def adamw_optimizer_case(device: str) -> float:
    """`FusedAdamW` by the kernel and PyTorch's AdamW: two groups, gradients that are replaced, some 16-bit copies."""
    from nemo_llm.optim.adamw import FusedAdamW
    from tests.models.kernel_checks import error

    sizes = [(64, 40), (40,), (7, 3), (5,)]
    ours, others = ([torch.randn(size, device=device, generator=_seeded(device)) for size in sizes] for _ in range(2))
    groups = [[{"params": x[:1] + x[2:3]}, {"params": x[1:2] + x[3:], "weight_decay": 0.0}] for x in (ours, others)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = FusedAdamW(groups[0], **settings), torch.optim.AdamW(groups[1], **settings)
    optimizer.halves = {x: torch.zeros_like(x, dtype=torch.float16) for x in ours[:2]}
    optimizer.gradient_factor, optimizer.gradients_stay = 0.25, True
    for step in range(1, 5):
        for mine, other in zip(ours, others, strict=True):
            if mine.grad is None or step == 3:
                mine.grad = torch.empty_like(mine)
            mine.grad.normal_()
            other.grad = mine.grad * 0.25
        for number, group in enumerate(optimizer.param_groups):
            group["step"] = step
            optimizer._launch(number)
        reference.step()
    assert all(torch.equal(half, x.half()) for x, half in optimizer.halves.items())
    return max(error(mine, other.double()) for mine, other in zip(ours, others, strict=True))


def _seeded(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


def exact_cases(device: str, small: bool):
    """As `all_cases`, of kernels whose results are equal to PyTorch's in every bit."""
    sizes = [(100, 2, 5), (300, 8, 128), (3, 1, 3)]
    sizes += [] if small else [(8192, 8, 128), (5000, 6, 64), (4096, 8, 256), (65536, 2, 8), (999, 10, 512)]
    for size, skew in itertools.product(sizes, ("even", "one")):
        yield f"routes {size} {skew}", torch.float32, partial(routes_case, size, skew, device)
    sizes = [[70, 3, 1, 1100], [64, 1040, 40]] + ([] if small else [[40_000_000, 65537, 131], [1 << 24, 4096] * 8])
    half = torch.float16 if small else torch.bfloat16  # the interpreter cuts bf16 off instead of rounding
    for size, dtype, divisor in itertools.product(sizes, (half, None), (1.0, 8123.4567)):
        name = f"adamw {len(size)} tensors, {sum(size)} values, copies {dtype}, divisor {divisor}"
        yield name, torch.float32, partial(adamw_case, size, dtype, divisor, device)
    yield "adamw in the optimizer", torch.float32, partial(adamw_optimizer_case, device)
