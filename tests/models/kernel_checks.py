"""Each Triton kernel against float64 autograd on random inputs and odd shapes; on the device that is named.

``python -m tests.models.kernel_checks cpu`` in Triton's interpreter (TRITON_INTERPRET=1), ``cuda`` on a GPU; with a
third word the cases whose names begin with it. Prints the largest error of each, relative to the largest value, and
ends with 1 where one is over its bound.
"""

import inspect
import itertools
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tests.models.exact_kernel_checks import exact_cases

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return ((ours.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def gradients(
    outputs: list[torch.Tensor], sources: list[torch.Tensor], seeds: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs, then the gradients of ``sum(output * seed)``."""
    total = sum((output * seed.to(output.dtype)).sum() for output, seed in zip(outputs, seeds, strict=True))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, sources)]


def compare(ours, reference, inputs: list[torch.Tensor]) -> float:
    """Run both on the same inputs; the largest error over outputs and gradients."""
    here = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, wanted = ours(*here), reference(*exact)
    seeds = [torch.randn_like(output) for output in outputs]
    pairs = zip(gradients(outputs, here, seeds), gradients(wanted, exact, [s.double() for s in seeds]), strict=True)
    return max(error(a, b) for a, b in pairs)


def norm_case(shape: tuple[int, ...], dtype: torch.dtype, device: str, kind: tuple[bool, bool, bool]) -> float:
    """One norm: with or without residual, LayerNorm or RMSNorm, zero-centred weight or not."""
    from nemo_llm.kernels.norm_swiglu import FusedNorm

    residual, layer, zero_centered = kind
    h = shape[-1]
    inputs = [torch.randn(*shape, device=device, dtype=dtype) for _ in range(1 + residual)]
    inputs += [torch.randn(h, device=device, dtype=dtype) for _ in range(1 + layer)]

    def parts(tensors):
        return tensors[0], tensors[1] if residual else None, tensors[1 + residual], tensors[-1] if layer else None

    def reference(*tensors):
        x, r, w, b = parts(tensors)
        total = x if r is None else x + r
        w = w + 1 if zero_centered else w
        normed = F.rms_norm(total, (h,), w, 1e-5) if b is None else F.layer_norm(total, (h,), w, b, 1e-5)
        return normed, total

    return compare(lambda *t: FusedNorm.apply(*parts(t), (1e-5, zero_centered)), reference, inputs)


def heads_norm_case(dtype: torch.dtype, device: str) -> float:
    """The norm of heads that lie apart in a projection's output, of which it keeps no copy."""
    from nemo_llm.kernels.norm_swiglu import FusedNorm

    inputs = [torch.randn(50, 2, 3, 96, device=device, dtype=dtype), torch.randn(24, device=device, dtype=dtype)]

    def ours(mixed, weight):
        normed, _ = FusedNorm.apply(mixed[..., 24:48], None, weight, None, (1e-5, False))
        kept = {tensor.data_ptr() for tensor in normed.grad_fn.saved_tensors}
        assert mixed[..., 24:48].data_ptr() in kept
        return (normed,)

    return compare(ours, lambda mixed, weight: (F.rms_norm(mixed[..., 24:48], (24,), weight, 1e-5),), inputs)


def swiglu_case(rows: int, units: int, dtype: torch.dtype, device: str, bias: bool) -> float:
    """SwiGLU with and without a bias."""
    from nemo_llm.kernels.norm_swiglu import FusedSwiGLU

    inputs = [torch.randn(rows, 2 * units, device=device, dtype=dtype)]
    if bias:
        inputs.append(torch.randn(2 * units, device=device, dtype=dtype))

    def reference(x, b=None):
        gate, up = (x if b is None else x + b).chunk(2, -1)
        return (F.silu(gate) * up,)

    return compare(lambda x, b=None: (FusedSwiGLU.apply(x, b),), reference, inputs)


def rotation_by_row_case(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> float:
    """The split with rotation of one token of each row, at a position of its own; ``sizes`` = (b, G, R, D)."""
    from nemo_llm.models.layers.rope import rotate, split_and_rotate

    b, groups, queries, width = sizes
    angles = torch.randn(1, b, 1, width // 2, device=device) * 3
    freqs = torch.cat((angles, angles), -1)
    mixed = torch.randn(1, b, groups, (queries + 2) * width, device=device, dtype=dtype)
    split = [queries * width, width, width]

    def reference(x):
        q, k, v = x.split(split, -1)
        return rotate(q.reshape(1, b, -1, width), freqs.double()), rotate(k, freqs.double()), v

    return compare(lambda x: split_and_rotate(x, freqs, freqs, split), reference, [mixed])


def qkv_case(sizes: tuple[int, int, int, int, int], turned: int, dtype: torch.dtype, device: str) -> float:
    """The split with rotation; ``sizes`` = (s, b, G, R, D)."""
    from nemo_llm.kernels.qkv_split_rotary import FusedQKV
    from nemo_llm.models.layers.rope import rotate

    s, b, groups, queries, width = sizes
    angles = torch.randn(s, turned // 2, device=device) * 3
    freqs = torch.cat((angles, angles), -1)
    mixed = torch.randn(s, b, groups, (queries + 2) * width, device=device, dtype=dtype)

    def reference(x):
        q, k, v = x.split([queries * width, width, width], -1)
        exact = freqs.double()[:, None, None]
        return rotate(q.reshape(s, b, -1, width), exact), rotate(k, exact), v

    return compare(lambda x: FusedQKV.apply(x, freqs.cos(), freqs.sin(), (queries, width)), reference, [mixed])


def loss_case(sizes: tuple[int, int, int], z_coeff: float, dtype: torch.dtype, device: str) -> float:
    """Losses and the gradient in place of the logits; ``sizes`` = (t, v, known). Labels beyond are among them."""
    from nemo_llm.kernels.cross_entropy_inplace import losses_and_gradient

    rows, columns, known = sizes
    logits = torch.randn(rows, columns, device=device, dtype=dtype) * 4
    labels = torch.randint(0, known, (rows,), device=device)
    weights = (torch.rand(rows, device=device) > 0.3).float()
    labels[0], weights[0] = -100, 0.0
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact[:, :known], labels, reduction="none")
    wanted = wanted + z_coeff * exact[:, :known].logsumexp(-1).square()
    (wanted * weights).sum().backward()
    hits = exact[:, :known].argmax(-1) == labels
    losses, hit = losses_and_gradient(logits, labels, weights, known, z_coeff)
    ties = dtype == torch.bfloat16  # two logits can be the largest
    assert (hit.bool() | ~hits)[1:].all() if ties else torch.equal(hit[1:].bool(), hits[1:])
    assert exact.grad is not None
    return max(error(losses[1:], wanted.detach()[1:]), error(logits, exact.grad))


def embedding_case(sizes: tuple[int, int, int], tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """Rows added to a table that is not empty; ``sizes`` = (v, h, T). Twice, for the same bits."""
    from nemo_llm.kernels.embedding_gradient import add_rows

    vocabulary, columns, count = sizes
    gradient = torch.randn(count, columns, device=tokens.device, dtype=dtype)
    start = torch.randn(vocabulary, columns, device=tokens.device)
    wanted, here = start.double(), tokens >= 0
    wanted.index_add_(0, tokens[here], gradient[here].double())
    results = []
    for _ in range(2):
        results.append(start.clone())
        add_rows(results[-1], tokens, gradient)
    assert torch.equal(*results)
    return error(results[0], wanted)


def decode_case(
    sizes: tuple[int, int, int, int, int], rule: tuple[int | None, float | None], dtype: torch.dtype, device: str
) -> float:
    """One token of each row over the cache; ``sizes`` = (b, g, R, D, S), ``rule`` = (window, cap)."""
    from nemo_llm.kernels.decode_attention import attend_to_cache

    b, groups, queries, width, slots = sizes
    window, cap = rule
    positions = torch.randint(0, slots, (b,), device=device)
    positions[0], positions[-1] = 0, slots - 1
    cached = [torch.randn(b, groups, slots, width, device=device, dtype=dtype) for _ in range(2)]
    new = [torch.randn(b, groups, width, device=device, dtype=dtype) for _ in range(2)]
    query = torch.randn(b, groups * queries, width, device=device, dtype=dtype)
    keys, values = (buffer.double() for buffer in cached)
    rows = torch.arange(b, device=device)
    keys[rows, :, positions], values[rows, :, positions] = new[0].double(), new[1].double()
    scale = width**-0.5
    logits = query.double().view(b, groups, queries, width) @ keys.transpose(-1, -2) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    slot = torch.arange(slots, device=device)
    seen = slot <= positions[:, None]
    if window is not None:
        seen &= slot > positions[:, None] - window
    wanted = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1) @ values
    ours = attend_to_cache(query, tuple(new), tuple(cached), positions, slots, (scale, window, cap))
    assert torch.equal(cached[0].double(), keys)
    assert torch.equal(cached[1].double(), values)
    return error(ours, wanted.flatten(1, 2))


def expert_case(sizes: tuple[int, int, int, int, int], skew: str, dtype: torch.dtype, device: str) -> float:
    """A mixture of experts, forward and backward, by the grouped kernels; ``sizes`` = (T, k, E, h, f).

    ``skew``: "even" chooses at random, "one" sends every token to the same experts, so that the others have no rows.
    """
    from nemo_llm.kernels import grouped_experts as kernels
    from nemo_llm.models.layers.experts import routes_of_choices

    tokens, choices, experts, columns, units = sizes
    scores = torch.rand(tokens, experts, device=device)
    chosen = (scores if skew == "even" else scores[:1].expand_as(scores)).topk(choices, -1).indices
    x, seed = (torch.randn(tokens, columns, device=device, dtype=dtype) for _ in range(2))
    share = torch.rand(tokens, choices, device=device)
    fc1 = [torch.randn(2 * units, columns, device=device, dtype=dtype) / columns**0.5 for _ in range(experts)]
    fc2 = [torch.randn(columns, units, device=device, dtype=dtype) / units**0.5 for _ in range(experts)]
    exact = [t.double().requires_grad_() for t in (x, share, torch.stack(fc1), torch.stack(fc2))]
    wanted = torch.zeros(tokens, columns, dtype=torch.float64, device=device)
    for expert in range(experts):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (exact[0][token] @ exact[2][expert].t()).chunk(2, -1)
        hidden = F.silu(gate) * up * exact[1][token, choice][:, None]
        wanted = wanted.index_add(0, token, hidden @ exact[3][expert].t())
    wanted.backward(seed.double())

    routes = routes_of_choices(chosen, experts)
    before = kernels.grouped_product(x, fc1, routes, transposed=True, gather=True)
    after = kernels.weighted_swiglu(before, share, routes)
    out = kernels.sum_of_rows(kernels.grouped_product(after, fc2, routes, transposed=True, gather=False), routes)
    after_grad = kernels.grouped_product(seed, fc2, routes, transposed=False, gather=True)
    before_grad, share_grad, again = kernels.weighted_swiglu_backward(after_grad, before, share, routes)
    assert torch.equal(again, after)
    rows_grad = kernels.grouped_product(before_grad, fc1, routes, transposed=False, gather=False)
    pairs = [(out, wanted.detach()), (kernels.sum_of_rows(rows_grad, routes), exact[0].grad)]
    pairs.append((share_grad, exact[1].grad))
    for weights, left, right, gradient in (
        (fc1, before_grad, x[routes.tokens], exact[2].grad),
        (fc2, seed[routes.tokens], after, exact[3].grad),
    ):
        start = [torch.randn(w.shape, device=device) for w in weights]
        for overwrite in (False, True):
            buffers = [torch.full_like(s, torch.nan) if overwrite else s.clone() for s in start]
            kernels.add_grouped_weight_gradient(buffers, left, right, routes, overwrite)
            base = torch.zeros_like(gradient) if overwrite else torch.stack(start).double()
            pairs.append((torch.stack(buffers), gradient + base))
    return max(error(ours, exact_one) for ours, exact_one in pairs)


def quantize_case(m: int, k: int, dtype: torch.dtype) -> float:
    """The FP8 kernels against the same rounding in PyTorch: share of values that differ, and exact transposes."""
    from nemo_llm.models.layers.fp8 import quantize

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16) * 3
    ours, wanted = quantize(x, dtype), quantize(x.cpu(), dtype)
    assert torch.equal(ours.rows.float(), ours.columns.float().t())
    assert torch.allclose(ours.factor.cpu(), wanted.factor, rtol=1e-6)
    return (ours.rows.cpu().float() != wanted.rows.float()).float().mean().item()


def fp8_product_case(rows: int, inner: int, columns: int) -> float:
    """A weight's gradient in FP8, written over what is in the buffer: the values of the product that makes its own."""
    from nemo_llm.models.layers.fp8 import multiply, quantize

    left, right = (quantize(torch.randn(size, inner, device="cuda"), torch.float8_e4m3fn) for size in (rows, columns))
    factors = ((left.rows, left.factor), (right.rows, right.factor))
    buffer = torch.full((rows, columns), torch.nan, device="cuda")
    return error(multiply(*factors, torch.float32, out=buffer), multiply(*factors, torch.float32).double())


def product_case(shape: Any) -> float:
    """Every kernel that cuBLASLt has for a product: how many differ from PyTorch's result in any bit."""
    from nemo_llm.kernels.cublaslt import Product

    left, right = (torch.randn(*size, device="cuda").bfloat16() for size in (shape.left_size, shape.right_size))
    start = torch.randn(shape.rows, shape.columns, device="cuda").to(shape.out_dtype)
    a, b = left.t() if shape.left_transposed else left, right.t() if shape.right_transposed else right
    exact = a.double() @ b.double() + (start.double() if shape.accumulate else 0.0)
    wanted = torch.addmm(start, a, b, out_dtype=torch.float32) if shape.accumulate else a @ b
    product = Product(shape, torch.device("cuda", torch.cuda.current_device()))
    assert len(product) > 0
    different, largest = 0, 0.0
    for kernel in range(len(product)):
        out = start.clone()
        product.run(left, right, out, kernel)
        different += not torch.equal(out, wanted)
        largest = max(largest, error(out, exact))
        if shape.accumulate:
            out.fill_(torch.nan)
            product.run(left, right, out, kernel, overwrite=True)
            largest = max(largest, error(out, exact - start.double()))
    if shape.accumulate:  # as kernels/matmul.py does it where no kernel was chosen
        out = torch.full_like(start, torch.nan)
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=0, out=out)
        largest = max(largest, error(out, exact - start.double()))
    print(f"     {different} of {len(product)} kernels differ from PyTorch's in bits: {shape}")
    return largest


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


def flex_case(sizes: tuple[int, ...], documents: bool, window: int | None, cap: float | None) -> float:
    """As models/layers/flex_attention.py calls it, with gradients; ``sizes`` = (b, n, g, sq, sk, d), bf16."""
    from nemo_llm.models.layers.flex_attention import attend

    torch.compiler.reset()  # more cases than torch.compile keeps of one function
    b, n, g, sq, sk, width = sizes
    numbers = (torch.rand(b, sk + 5, device="cuda") < 0.01).cumsum(-1) if documents else None
    inputs = [
        torch.randn(b, heads, length, width, device="cuda", dtype=torch.bfloat16)
        for heads, length in ((n, sq), (g, sk), (g, sk))
    ]
    rule = (width**-0.5, cap)
    return compare(
        lambda *t: (attend(t, numbers, window, rule),), lambda *t: (dense(t, numbers, window, rule),), inputs
    )


def all_cases(device: str, small: bool):
    """(name, dtype, what gives the error) of every case."""
    torch.manual_seed(1)
    dtypes = (torch.float32,) if small else (torch.float32, torch.bfloat16)
    shapes = [(5, 2, 24), (3, 1, 160), (300, 2, 24)]
    if not small:
        shapes += [(1000, 4, 2048), (513, 1, 5440), (64, 2, 8192), (1000, 2, 36, 128)]
    for shape, dtype, kind in itertools.product(shapes, dtypes, itertools.product((False, True), repeat=3)):
        name = f"norm {shape} residual, layer, zero-centred {kind}"
        yield name, dtype, partial(norm_case, shape, dtype, device, kind)
    for (rows, units), dtype, bias in itertools.product(
        [(3, 24), (2, 1030)] if small else [(3, 24), (4096, 8192), (777, 5440)], dtypes, (False, True)
    ):
        yield f"swiglu {rows}x{units} bias {bias}", dtype, partial(swiglu_case, rows, units, dtype, device, bias)
    sizes = [((4, 2, 2, 3, 12), 12), ((3, 1, 1, 1, 8), 4), ((2, 2, 3, 1, 16), 8)]
    if not small:
        sizes += [
            ((512, 4, 8, 4, 64), 64),
            ((512, 2, 8, 4, 128), 128),
            ((300, 3, 16, 1, 128), 64),
            ((64, 1, 1, 71, 64), 64),
        ]
    for (size, turned), dtype in itertools.product(sizes, dtypes):
        yield f"qkv {size} turned {turned}", dtype, partial(qkv_case, size, turned, dtype, device)
    for dtype in dtypes:
        yield "qkv by row", dtype, partial(rotation_by_row_case, (5, 2, 3, 16), dtype, device)
        yield "norm of heads", dtype, partial(heads_norm_case, dtype, device)
    sizes = [(5, 64, 59), (3, 130, 130)] + ([] if small else [(700, 50304, 50257), (300, 128256, 128256), (9, 1000, 7)])
    for size, z_coeff, dtype in itertools.product(sizes, (0.0, 1e-2), dtypes):
        yield f"loss {size} z {z_coeff}", dtype, partial(loss_case, size, z_coeff, dtype, device)
    sizes = [(11, 24, 70), (40, 300, 9)] + ([] if small else [(5000, 2048, 32768), (1, 5440, 3000)])
    for size, dtype in itertools.product(sizes, dtypes):
        tokens = torch.randint(-1, size[0], (size[2],), device=device)
        yield f"embedding {size}", torch.float32, partial(embedding_case, size, tokens, dtype)
    sizes = [(3, 2, 3, 12, 70), (2, 1, 1, 16, 600)]
    if not small:
        sizes += [
            (64, 8, 4, 64, 1024),
            (3, 8, 4, 128, 5000),
            (5, 1, 71, 64, 777),
            (2, 4, 1, 96, 300),
            (2, 2, 2, 256, 700),
        ]
    for size, window, cap, dtype in itertools.product(sizes, (None, 40), (None, 3.0), dtypes):
        name = f"decode {size} window {window} cap {cap}"
        yield name, dtype, partial(decode_case, size, (window, cap), dtype, device)
    sizes = [(40, 2, 5, 24, 12), (7, 1, 3, 72, 40)]
    if not small:
        sizes += [(4096, 8, 128, 2048, 768), (1000, 6, 64, 528, 1408), (300, 2, 8, 136, 72)]
    for size, skew, dtype in itertools.product(sizes, ("even", "one"), dtypes):
        yield f"experts {size} {skew}", dtype, partial(expert_case, size, skew, dtype, device)
    yield from exact_cases(device, small)
    if not small:
        yield from library_cases()


def library_cases():
    """As `all_cases`, of what has no kernel of our own, on a GPU alone: FP8, FlexAttention, cuBLASLt."""
    from nemo_llm.kernels.cublaslt import ProductShape

    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        # A value on the edge between two FP8 numbers may fall to either side: the scale is a float32 rounding off.
        yield "quantize 1000x528", torch.bfloat16, partial(quantize_case, 1000, 528, dtype)
    yield "product in FP8", torch.float32, partial(fp8_product_case, 528, 1024, 272)
    sizes = [(2, 4, 2, 512, 512, 64), (1, 8, 8, 300, 300, 128), (2, 4, 1, 256, 640, 128), (1, 2, 1, 999, 999, 256)]
    for size, documents, window, cap in itertools.product(sizes, (False, True), (None, 100), (None, 5.0)):
        name = f"flex {size} documents {documents} window {window} cap {cap}"
        yield name, torch.bfloat16, partial(flex_case, size, documents, window, cap)
    for rows, inner, columns in ((4096, 2048, 3072), (1000, 528, 24), (8, 8192, 8), (2048, 16384, 2048)):
        for flags in ((False, True, False), (False, False, False), (True, False, True)):
            shape = ProductShape(rows, inner, columns, *flags)
            yield f"product {rows}x{inner}x{columns} {flags}", torch.bfloat16, partial(product_case, shape)


def kernels_not_warmed(device: str) -> set[str]:
    """Kernels of training that `run_kernels` does not launch for three configurations that together need them all."""
    from nemo_llm.config.compose.load import compose
    from nemo_llm.kernels import (
        adamw,
        cross_entropy_inplace,
        embedding_gradient,
        fp8_quantize,
        norm_swiglu,
        qkv_split_rotary,
    )
    from nemo_llm.models.warm_kernels import run_kernels

    launched = set()
    wanted = {
        (module, name): kernel
        for module in (norm_swiglu, qkv_split_rotary, cross_entropy_inplace, embedding_gradient, fp8_quantize, adamw)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "run") and not isinstance(kernel, type) and f"{name}[" in inspect.getsource(module)
    }

    def record(kernel, place):
        run = kernel.run

        def recording(*arguments, **settings):
            launched.add(place)
            return run(*arguments, **settings)

        kernel.run = recording

    for place, kernel in wanted.items():
        record(kernel, place)
    small = ["data=mock", "data.seq_length=8", "model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=64"]
    small += ["model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=16"]
    precision = "precision=fp8_tensorwise" if device == "cuda" else "precision=bf16"
    for options in (["+model=llama3_1b", precision], ["+model=gpt_1b"], ["+model=qwen3_0_6b", "precision=bf16"]):
        run_kernels(compose([*options, *small]).model_setting, torch.device(device), 1000)
    missing = set(wanted) - launched
    return {name for module, name in missing if device == "cuda" or module is not fp8_quantize}


def main() -> int:
    """Print every case; 1 where one fails."""
    device, beginning = sys.argv[1], " ".join(sys.argv[2:])
    failed = 0
    for name, dtype, case in all_cases(device, small=device == "cpu"):
        if not name.startswith(beginning):
            continue
        began = time.perf_counter()
        largest = case()
        good = largest < BOUNDS[dtype]
        failed += not good
        seconds = time.perf_counter() - began
        print(f"{'ok  ' if good else 'FAIL'} {largest:9.1e} {seconds:5.1f} s {str(dtype)[6:]:9} {name}", flush=True)
    if beginning:
        return int(failed > 0)
    not_warmed = kernels_not_warmed(device)
    print(f"{'FAIL' if not_warmed else 'ok  '} kernels that are not compiled ahead: {sorted(not_warmed) or 'none'}")
    return int(failed > 0 or bool(not_warmed))


if __name__ == "__main__":
    sys.exit(main())
