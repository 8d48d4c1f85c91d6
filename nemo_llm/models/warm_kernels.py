"""Compile kernels once a node: one rank runs them on empty tensors, the others then find them in the node's cache.

Eight ranks that reach their first step together would all compile the same Triton kernels. The first rank of a node
runs each kernel of a training step alone, on tensors of the run's shapes and dtypes, while the others wait; Triton and
Inductor keep what they compile in ``TRITON_CACHE_DIR`` and ``TORCHINDUCTOR_CACHE_DIR``. What Megatron compiles for
itself (dropout with its bias, experts' activation) and ``performance.compile_layers`` need a whole layer, whose
collectives one rank cannot run alone: there every rank still compiles.
"""

import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from nemo_llm.config.checks.code_paths import (
    fused_chunk_tokens,
    fuses_rope,
    splits_qkv,
    used_window,
    why_no_flex,
    why_not_grouped,
)
from nemo_llm.config.sections.arithmetic import padded_vocab_size
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.kernels.cublaslt import ProductShape
from nemo_llm.kernels.matmul import choose_kernels, shapes_of_linear
from nemo_llm.log import get_logger
from nemo_llm.models.language_model import LanguageModel
from nemo_llm.models.layers import flex_attention
from nemo_llm.models.layers.experts import ExpertProducts, routes_of_choices, routes_of_counts, routes_of_map
from nemo_llm.models.layers.linear import WholeLinear, weights_with_product
from nemo_llm.models.layers.linear_cross_entropy import compile_for_loss
from nemo_llm.models.layers.rope import rotate_fused
from nemo_llm.models.specs import choose_backend
from nemo_llm.models.transformer_config import DTYPES, softmax_scale
from nemo_llm.parallel.runtime import ParallelRuntime

_log = get_logger(__name__)


def warm_kernels(setting: ModelSetting, runtime: ParallelRuntime, vocab_size: int) -> None:
    """Fill this node's caches of compiled kernels, where several ranks share them; a collective of all ranks."""
    if runtime.device.type != "cuda" or runtime.place.local_world_size == 1:
        return
    if runtime.place.local_rank == 0:
        began = time.perf_counter()
        run_kernels(setting, runtime.device, vocab_size)
        torch.cuda.synchronize(runtime.device)
        torch.cuda.empty_cache()
        _log.info("kernels compiled or found in the node's cache in %.1f s", time.perf_counter() - began)
    dist.all_reduce(torch.zeros(1, device=runtime.device))


def choose_products(setting: ModelSetting, chunks: list[torch.nn.Module], device: torch.device) -> None:
    """Choose the kernels of the matrix products of these (unwrapped) chunks, and say which are not PyTorch's."""
    if device.type != "cuda" or why_no_choice(setting, device) is not None:
        return
    shapes = [shape for chunk in chunks for shape in _product_shapes(setting, unwrap_model(chunk))]
    began = time.perf_counter()
    try:
        choices = choose_kernels(shapes, device)
    except (OSError, AttributeError, RuntimeError) as error:
        _log.warning("matrix products keep PyTorch's kernels: cuBLASLt's could not be timed: %s", error)
        return
    finally:
        torch.cuda.empty_cache()
    gains = [choice.before / choice.after for choice in choices]
    _log.info(
        "matrix products: another kernel of cuBLASLt for %d of %d shapes, up to %.2f times as fast; chosen in %.1f s",
        len(gains), len(set(shapes)), max(gains, default=1.0), time.perf_counter() - began,
    )  # fmt: skip
    for choice in choices:
        _log.debug("%s: %.3f ms, before %.3f ms", choice.shape, choice.after, choice.before)


def why_no_choice(setting: ModelSetting, device: torch.device) -> str | None:
    """Why the matrix products of this run keep PyTorch's choice of kernels on this GPU; None where another is tried."""
    reasons = {
        "performance.choose_matrix_kernels=false": not setting.performance.choose_matrix_kernels,
        "performance.compile_layers=true": setting.performance.compile_layers,
        "a GPU before Hopper": torch.cuda.get_device_capability(device)[0] < 9,
        f"parameters in {setting.precision.params_dtype}": setting.precision.params_dtype != "bf16",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _product_shapes(setting: ModelSetting, chunk: LanguageModel) -> Iterator[ProductShape]:
    """Of the linear layers whose number of tokens is known, and of the fused loss."""
    tokens = setting.seq_length // setting.parallelism.context_parallel_size * setting.micro_batch_size
    for weight in weights_with_product(chunk, WholeLinear.product):  # layers in FP8 have a product of their own
        yield from shapes_of_linear(tokens, weight)
    if chunk.fuses_loss:
        assert chunk.fused_chunk_tokens is not None
        for rows in _chunks_of_tokens(tokens, chunk.fused_chunk_tokens):
            yield from shapes_of_linear(rows, chunk.output_weight)


def _chunks_of_tokens(tokens: int, chunk: int) -> set[int]:
    """Sizes of the pieces in which the fused loss takes them."""
    return {min(chunk, tokens), tokens % chunk} - {0}


def run_kernels(setting: ModelSetting, device: torch.device, vocab_size: int) -> None:
    """Run, forward and backward, every kernel of our own that a training step of ``setting`` launches on one rank.

    Args:
        vocab_size: tokens that the model knows.
    """
    layout, model = setting.parallelism, setting.model
    tp = layout.tensor_model_parallel_size
    length = setting.seq_length // layout.context_parallel_size
    tokens = length * setting.micro_batch_size
    dtype = DTYPES[setting.precision.params_dtype]
    like = {"dtype": dtype, "device": device}
    if setting.performance.fused_kernels:
        if choose_backend(model, "cuda") == "torch":
            _run_norms(setting, tokens // (tp if layout.sequence_parallel else 1), like)
            _run_head_norms(setting, tokens, like)
            _run_fp8(setting, tokens, like)
        if model.activation_func == "silu" and model.gated_linear_unit:
            _run_swiglu(setting, tokens, like)
    if model.moe is not None and choose_backend(model, "cuda") == "torch":
        _run_experts(setting, tokens, like)
    if fuses_rope(setting):
        _run_rope(setting, length, like)
    run_flex(setting, like)
    if fused_chunk_tokens(setting) is not None:
        columns = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by) // tp
        for rows in _chunks_of_tokens(tokens, setting.performance.cross_entropy_chunk_tokens):
            _run_loss(torch.zeros(rows, columns, **like), alone=tp == 1 and model.final_logit_softcapping is None)
    _run_embedding(setting, tokens, like)
    _run_adamw(like)


def _run_norms(setting: ModelSetting, rows: int, like: dict) -> None:
    from nemo_llm.kernels.norm_swiglu import FusedNorm

    model = setting.model
    rule = (model.layernorm_epsilon, model.layernorm_zero_centered_gamma)
    x, residual = (torch.zeros(rows, model.hidden_size, **like).requires_grad_() for _ in range(2))
    weight = torch.zeros(model.hidden_size, **like).requires_grad_()
    bias = torch.zeros_like(weight).requires_grad_() if model.normalization == "LayerNorm" else None
    # The first norm of a layer, the second, and the one after the last layer.
    for added, sum_used in ((None, True), (residual, True), (None, False)):
        normed, total = FusedNorm.apply(x, added, weight, bias, rule)
        ((normed + total) if sum_used else normed).sum().backward()


def _run_head_norms(setting: ModelSetting, tokens: int, like: dict) -> None:
    from nemo_llm.kernels.norm_swiglu import FusedNorm

    model, tp = setting.model, setting.parallelism.tensor_model_parallel_size
    if not model.qk_layernorm or model.qk_layernorm_scope != "head" or model.mla is not None:
        return
    weight = torch.zeros(model.head_dim, **like).requires_grad_()
    bias = torch.zeros_like(weight).requires_grad_() if model.normalization == "LayerNorm" else None
    for heads in {model.num_attention_heads // tp, max(model.num_query_groups // tp, 1)}:
        x = torch.zeros(tokens, heads, model.head_dim, **like).requires_grad_()
        normed, _ = FusedNorm.apply(
            x, None, weight, bias, (model.layernorm_epsilon, model.layernorm_zero_centered_gamma)
        )
        normed.sum().backward()


def _run_fp8(setting: ModelSetting, rows: int, like: dict) -> None:
    if setting.precision.fp8 is None:
        return
    from nemo_llm.models.layers.fp8 import quantize

    x = torch.zeros(rows, setting.model.hidden_size, **like)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        quantize(x, dtype)


def _run_swiglu(setting: ModelSetting, rows: int, like: dict) -> None:
    from nemo_llm.kernels.norm_swiglu import FusedSwiGLU

    units = setting.model.ffn_hidden_size // setting.parallelism.tensor_model_parallel_size
    x = torch.zeros(rows, 2 * units, **like).requires_grad_()
    bias = torch.zeros(2 * units, **like).requires_grad_() if setting.model.add_bias_linear else None
    FusedSwiGLU.apply(x, bias).sum().backward()


def _run_experts(setting: ModelSetting, tokens: int, like: dict) -> None:
    """The grouped products of tokens that are here and of rows that came from other ranks, with both ways to add."""
    if why_not_grouped(setting) is not None:
        return
    model, layout = setting.model, setting.parallelism
    assert model.moe is not None
    units = model.moe.moe_ffn_hidden_size // layout.expert_tp_size
    fc1, fc2 = torch.zeros(2 * units, model.hidden_size, **like), torch.zeros(model.hidden_size, units, **like)
    weights = [weight.requires_grad_() for weight in (fc1, fc1.clone(), fc2, fc2.clone())]
    x, share = torch.zeros(tokens, model.hidden_size, **like), torch.zeros(tokens, 2, device=like["device"])
    here = routes_of_choices(torch.zeros_like(share, dtype=torch.int64) + torch.arange(2, device=x.device), 2)
    number = torch.arange(model.moe.num_moe_experts, device=x.device)
    routes_of_map((number < model.moe.moe_router_topk).expand(tokens, -1), model.moe.moe_router_topk)
    sent = routes_of_counts(torch.tensor([tokens, 0]), x.device)
    for routes, shares in ((here, share), (sent, share[:, 0].contiguous())):
        for stale in (True, False):
            for weight in weights:
                weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
                weight.main_grad.stale = stale
            inputs = x.clone().requires_grad_()
            ExpertProducts.apply(inputs, shares.clone().requires_grad_(), routes, weights).sum().backward()


def _run_rope(setting: ModelSetting, length: int, like: dict) -> None:
    from nemo_llm.kernels.qkv_split_rotary import FusedQKV

    model, tp = setting.model, setting.parallelism.tensor_model_parallel_size
    batch, turned = setting.micro_batch_size, int(model.head_dim * model.rotary_percent)
    if splits_qkv(setting):
        queries, groups = model.num_attention_heads // model.num_query_groups, model.num_query_groups // tp
        mixed = torch.zeros(length, batch, groups, (queries + 2) * model.head_dim, **like).requires_grad_()
        angles = torch.zeros(length, turned, dtype=torch.float32, device=like["device"])
        sum(part.sum() for part in FusedQKV.apply(mixed, angles, angles, (queries, model.head_dim))).backward()
        return
    angles = torch.zeros(length, 1, 1, turned, dtype=torch.float32, device=like["device"])
    for heads in {model.num_attention_heads // tp, max(model.num_query_groups // tp, 1)}:
        heads_in = torch.zeros(length, batch, heads, model.head_dim, **like).requires_grad_()
        rotate_fused(heads_in, angles).sum().backward()


def run_flex(setting: ModelSetting, like: dict) -> None:
    """Attention of layers with a window and of those without, where the scores are masked or capped, both ways.

    Args:
        like: dtype and device of queries, keys and values.
    """
    model, layout, length = setting.model, setting.parallelism, setting.seq_length
    tp = layout.tensor_model_parallel_size
    # Under context parallelism each rank has lengths of its own.
    if why_no_flex(setting) or layout.context_parallel_size > 1 or choose_backend(model, "cuda") != "torch":
        return
    batch, cap = setting.micro_batch_size, model.attn_logit_softcapping
    documents = None
    if setting.reset_attention_mask:
        documents = torch.zeros(batch, length, dtype=torch.int32, device=like["device"])
    windows = {model.window_size} if model.window_attn_skip_freq is None else {model.window_size, None}
    for window in {used_window(window, length) for window in windows}:
        if window is None and documents is None and cap is None:
            continue
        groups = max(model.num_query_groups // tp, 1)
        queries, width = model.num_attention_heads // tp, model.head_dim
        q, k = (torch.zeros(length, batch, n, width, **like).requires_grad_() for n in (queries, groups))
        # Values lie where the joint projection left them, unless our kernel splits it.
        joint = 1 if splits_qkv(setting) else queries // groups + 2
        v = torch.zeros(length, batch, groups, joint * width, **like).requires_grad_()[..., -width:]
        scale = softmax_scale(model) or 1.0 / math.sqrt(width)  # to the last bit: it is a constant of the kernel
        heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        attended = flex_attention.attend(tuple(heads_first), documents, window, (scale, cap))
        attended.permute(2, 0, 1, 3).flatten(2).sum().backward()


def _run_loss(logits: torch.Tensor, alone: bool) -> None:
    labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    if alone:
        from nemo_llm.kernels.cross_entropy_inplace import losses_and_gradient

        losses_and_gradient(logits, labels, torch.zeros_like(labels, dtype=torch.float32), logits.shape[1], 0.0)
    # In evaluation, and where the vocabulary is split. Each a tensor of its own: for one that is given twice another
    # kernel is made.
    lse, row_scale, label_share = torch.zeros(3, logits.shape[0], dtype=torch.float32, device=logits.device).unbind()
    statistics, to_gradient = compile_for_loss(logits.device.type)
    statistics(logits)
    if not alone:
        to_gradient(logits, lse.clone(), row_scale.clone(), label_share.clone(), labels)


def _run_embedding(setting: ModelSetting, tokens: int, like: dict) -> None:
    from nemo_llm.kernels.embedding_gradient import add_rows

    numbers = torch.zeros(tokens, dtype=torch.int64, device=like["device"])
    buffer = torch.zeros(1, setting.model.hidden_size, dtype=torch.float32, device=like["device"])
    add_rows(buffer, numbers, torch.zeros(tokens, setting.model.hidden_size, **like))


def _run_adamw(like: dict) -> None:
    from nemo_llm.kernels.adamw import AdamWPass, AdamWRule

    lists = list(torch.zeros(4, 1, 64, dtype=torch.float32, device=like["device"]).unbind())
    halves = [] if like["dtype"] == torch.float32 else [torch.zeros(1, 64, **like)]
    AdamWPass([*lists, *halves]).run(AdamWRule(1, 0.0, (0.9, 0.95), 1e-8, 0.0))
