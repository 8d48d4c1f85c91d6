"""Time PyTorch's attention backends on the shapes of our models, in Megatron's [s, b, n, d] layout, forward and backward.

``python -m benchmarks.gpu_attention``. One line a shape and backend, with the largest difference from float32 arithmetic. Then
windows, documents and capped scores, each by the matrix of scores and by FlexAttention, through `CoreAttention`.
"""

import time

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


# (s, b, n, g, d), documents, window, cap: packed samples; Mistral's window; Gemma 2's two kinds of layers.
MASKED = [
    ((4096, 4, 32, 8, 64), 8, None, None),
    ((8192, 1, 32, 8, 128), 8, None, None),
    ((8192, 1, 32, 8, 128), 0, 4096, None),
    ((4096, 1, 8, 4, 256), 0, None, 50.0),
    ((8192, 1, 8, 4, 256), 0, 4096, 50.0),
]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention as models/layers/attention.py calls it: [s, b, n, d] -> [s, b, n * d]."""
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


def masked() -> None:
    """Attention that is not plainly causal, both ways."""
    from types import SimpleNamespace

    from nemo_llm.models.layers.attention import CoreAttention

    for (s, b, n, g, d), documents, window, cap in MASKED:
        torch.manual_seed(1)
        numbers = (torch.arange(s, device="cuda") // (s // documents)).expand(b, s) if documents else None
        config = SimpleNamespace(
            kv_channels=d, attention_dropout=0.0, window_size=None if window is None else (window - 1, 0),
            window_attn_skip_freq=None,
        )  # fmt: skip
        groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
        for flex_length in (None, s):
            q, k, v = (
                torch.randn(s, b, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                for heads in (n, g, g)
            )
            core = CoreAttention(config, 1, pg_collection=groups, logit_softcapping=cap, flex_length=flex_length)
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            try:
                out = core(q, k, v, numbers)
                seed = torch.randn_like(out)
                torch.autograd.grad(out, (q, k, v), seed, retain_graph=True)
                torch.cuda.synchronize()
                first = time.perf_counter() - began
                forward = milliseconds(lambda: core(q, k, v, numbers))  # noqa: B023
                backward = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), seed, retain_graph=True))  # noqa: B023
            except RuntimeError as error:
                print(f"MASKED {(s, b, n, g, d)} flex {flex_length is not None}: {str(error)[:100]}", flush=True)
                continue
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"MASKED {(s, b, n, g, d)} documents {documents} window {window} cap {cap} flex {flex_length is not None}: "
                f"forward {forward:.2f} ms, backward {backward:.2f} ms, peak {peak:.1f} GiB, first call {first:.1f} s",
                flush=True,
            )


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
    masked()
