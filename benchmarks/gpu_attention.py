"""Time PyTorch's attention backends on the shapes of our models, in Megatron's [s, b, n, d] layout, forward and backward.

``python -m benchmarks.gpu_attention``. One line a shape and backend, with the largest difference from float32 arithmetic.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# (s, b, n, g, d)
SHAPES = [
    (4096, 4, 32, 8, 64),
    (4096, 2, 32, 8, 128),
    (8192, 1, 32, 8, 128),
    (2048, 8, 16, 16, 128),
    (32768, 1, 8, 2, 128),
]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention as models/attention.py calls it: [s, b, n, d] -> [s, b, n * d]."""
    parts = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    context = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
    return context.permute(2, 0, 1, 3).flatten(2)


def milliseconds(function, repeats: int = 10) -> float:
    """Mean time of a call on the device."""
    for _ in range(3):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def main() -> None:
    """Every shape on every backend."""
    for s, b, n, g, d in SHAPES:
        torch.manual_seed(1)
        q, k, v = (
            torch.randn(s, b, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (n, g, g)
        )
        seed = torch.randn(s, b, n * d, device="cuda", dtype=torch.bfloat16)
        flops = 4 * s * s * b * n * d / 2
        exact = attend(*(x.detach()[:, :1].float() for x in (q, k, v))) if s <= 4096 else None
        for name, backend in BACKENDS.items():
            with sdpa_kernel(backend):
                try:
                    out = attend(q, k, v)
                except RuntimeError as error:
                    print(f"ATTENTION {(s, b, n, g, d)} {name}: {str(error)[:100]}")
                    continue
                forward = milliseconds(lambda: attend(q, k, v))  # noqa: B023
                backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), seed, retain_graph=True))  # noqa: B023
            error = 0.0 if exact is None else (out[:, :1].float() - exact).abs().max().item()
            print(
                f"ATTENTION {(s, b, n, g, d)} {name}: forward {forward:.2f} ms {flops / forward / 1e9:.0f} TFLOP/s, "
                f"backward {backward:.2f} ms {2.5 * flops / backward / 1e9:.0f} TFLOP/s, error {error:.1e}, "
                f"contiguous {out.is_contiguous()}",
                flush=True,
            )


if __name__ == "__main__":
    main()
