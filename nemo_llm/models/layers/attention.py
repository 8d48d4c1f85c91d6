"""Core attention for machines without Transformer Engine: PyTorch's scaled dot product, on CPU and GPU alike.

It takes the place of Megatron's ``DotProductAttention`` in the layer spec and adds grouped-query attention without
copies of the keys, context parallelism, sliding windows, document masks and logit soft-capping.

Shapes: ``s`` sequence, ``b`` micro-batch, ``n`` query heads and ``g`` key-value heads of this tensor-parallel rank,
``d`` head size; ``sq`` and ``sk`` where queries and keys differ in number.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from nemo_llm.config.checks.code_paths import layer_has_window, used_window
from nemo_llm.models.layers import flex_attention
from nemo_llm.models.layers.context_parallel import gather_sequence, heads_to_sequence, sequence_to_heads


class CoreAttention(MegatronModule):
    """Causal attention of one layer.

    Args:
        config: Megatron's configuration; heads, dropout, window and context parallelism are read from it.
        layer_number: 1-based number of the layer in the whole model.
        softmax_scale: factor on the logits; ``1/sqrt(d)`` when None.
        cp_comm_type: ``a2a`` (heads exchanged for sequence, Ulysses) or ``all_gather`` (keys and values gathered).
        pg_collection: Megatron's process groups.
        logit_softcapping: ``cap * tanh(logits / cap)`` before the softmax (Gemma 2, arXiv:2408.00118), or None.
        flex_length: on CUDA, windows, documents and caps of samples of this length by FlexAttention
            (models/layers/flex_attention.py), which makes no matrix of all scores and is compiled for each length;
            None: never.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        logit_softcapping: float | None = None,
        flex_length: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = config.window_size[0] + 1 if _layer_has_window(config, layer_number) else None
        self.logit_softcapping = logit_softcapping
        self.flex_length = flex_length
        self.cp_comm_type = cp_comm_type
        self.cp_group = pg_collection.cp
        self.layer_number = layer_number
        self.cache: Any = None
        """Keys and values of earlier tokens while text is generated (models/layers/kv_cache.py)."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend causally.

        Args:
            query: ``[s/cp, b, n, d]``; ``key`` and ``value``: ``[s/cp, b, g, d]``.
            attention_mask: None, or document numbers ``[b, s]`` (integers, the full sequence): a token then sees its
                own document alone; or a ready boolean mask ``[b, 1, sq, sk]`` (True = may look), for generation.

        Returns:
            ``[s/cp, b, n * d]``
        """
        if self.cache is not None:
            if self.cache.positions is not None and self.cache.fused:
                rule = (self.softmax_scale, self.window, self.logit_softcapping)
                return self.cache.attend(self.layer_number, query, (key, value), rule).flatten(2)
            if self.cache.positions is not None:
                keys, values = self.cache.extend(self.layer_number, key, value)
                return self._attend_cached(query, keys, values, self.cache.mask(self.window)).flatten(2)
            self.cache.fill(self.layer_number, key, value)
        cp = self.cp_group.size()
        if cp == 1:
            context = self._attend(query, key, value, attention_mask)
        elif self.cp_comm_type == "a2a":
            key, value = _repeat_heads(key, cp), _repeat_heads(value, cp)
            query, key, value = (heads_to_sequence(x, self.cp_group) for x in (query, key, value))
            context = sequence_to_heads(self._attend(query, key, value, attention_mask), self.cp_group)
        else:
            context = self._attend_gathered(query, key, value, attention_mask)
        return context.flatten(2)

    def _attend_gathered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """Gather keys and values of the whole sequence; this rank's early and late chunk each see their past."""
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = gather_sequence(key, self.cp_group), gather_sequence(value, self.cp_group)
        length = query.shape[0] // 2
        parts = []
        for chunk, part in zip((rank, 2 * cp - 1 - rank), query.chunk(2, 0), strict=True):
            end = (chunk + 1) * length
            parts.append(self._attend(part, key[:end], value[:end], documents))
        return torch.cat(parts, 0)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[sq, b, n, d] x [sk, b, g, d] -> [sq, b, n, d]; the queries are the last ``sq`` of the ``sk`` positions."""
        sq, sk = query.shape[0], key.shape[0]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        window = used_window(self.window, sk)
        plain = mask is None and window is None
        if self._takes_flex(q, sk, mask, plain):
            rule = (self.softmax_scale, self.logit_softcapping)
            return flex_attention.attend((q, k, v), mask, window, rule).permute(2, 0, 1, 3)
        allowed = None if plain else self._allowed(mask, sq, sk, query.device)
        with self._dropout_region(), _kernel_order(query.device) if plain and sq == sk else nullcontext():
            if self.logit_softcapping is not None:
                context = self._attend_softcapped(q, k, v, allowed)
            else:
                if plain and 1 < sq < sk:
                    allowed = causal_lower_right(sq, sk)
                context = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=allowed,
                    dropout_p=self.dropout if self.training else 0.0,
                    is_causal=plain and sq == sk,
                    scale=self.softmax_scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
        return context.permute(2, 0, 1, 3)

    def _takes_flex(self, q: torch.Tensor, sk: int, mask: torch.Tensor | None, plain: bool) -> bool:
        """Whether this is a case for FlexAttention, which takes no ready-made masks."""
        if self.flex_length is None or not q.is_cuda:
            return False
        # Context-parallel ranks gather keys up to the end of a chunk. Other lengths are those of prompts: for them
        # compiling would take longer than the matrix of scores.
        cp = self.cp_group.size()
        if sk % (self.flex_length // (2 * cp) if cp > 1 else self.flex_length):
            return False
        if mask is not None:
            return mask.dtype != torch.bool
        return not plain or self.logit_softcapping is not None

    def _attend_cached(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """One token of each row, [1, b, n, d], over cached [b, g, slots, d] -> [1, b, n, d].

        The query heads that share a key-value head stand as its queries: keys are read once and never copied.
        """
        _, rows, heads, channels = query.shape
        q = query[0].view(rows, keys.shape[1], heads // keys.shape[1], channels)
        if self.logit_softcapping is not None:
            context = self._attend_softcapped(q, keys, values, allowed)
        else:
            context = F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed, scale=self.softmax_scale)
        return context.reshape(1, rows, heads, -1)

    def _attend_softcapped(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        logits = (q @ k.transpose(-1, -2)).float() * self.softmax_scale
        logits = self.logit_softcapping * torch.tanh(logits / self.logit_softcapping)
        if allowed is None:
            allowed = self._allowed(None, q.shape[2], k.shape[2], q.device)
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype)
        return F.dropout(weights, self.dropout, self.training) @ v

    def _allowed(self, mask: torch.Tensor | None, sq: int, sk: int, device: torch.device) -> torch.Tensor:
        """Boolean [1 or b, 1, sq, sk]: causal, within the window, within the document."""
        if mask is not None and mask.dtype == torch.bool:
            return mask
        queries = torch.arange(sk - sq, sk, device=device)[:, None]
        keys = torch.arange(sk, device=device)[None, :]
        allowed = keys <= queries
        if self.window is not None:
            allowed = allowed & (keys > queries - self.window)
        if mask is None:
            return allowed[None, None]
        same_document = mask[:, None, sk - sq : sk, None] == mask[:, None, None, :sk]
        return allowed[None, None] & same_document

    def _dropout_region(self) -> Any:
        # Each tensor-parallel rank drops its own heads: Megatron keeps a generator state for that region.
        if self.training and self.dropout > 0.0:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()


class LocalRotaryAttention(SelfAttention):
    """One layer of a model that has other rotary angles in layers with a window (Gemma 3, arXiv:2503.19786)."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *inputs: Any, **settings: Any
    ) -> Any:
        """As Megatron's; ``rotary_pos_emb`` [..., 2r] are those of layers without a window, then the others."""
        angles = settings.get("rotary_pos_emb")
        if angles is not None:
            far, near = angles.chunk(2, -1)
            settings["rotary_pos_emb"] = near if _layer_has_window(self.config, self.layer_number) else far
        return super().forward(hidden_states, attention_mask, *inputs, **settings)


# On Hopper cuDNN's kernels are 1.5 times as fast as FlashAttention 2's (docs/benchmarks-gpu.md), and PyTorch 2.11 puts
# the latter first where Transformer Engine is installed.
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's kernels are tried first on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _kernel_order(device: torch.device) -> Any:
    """Which of PyTorch's kernels are tried first, in the order of their speed on this device."""
    return sdpa_kernel(_KERNELS, set_priority=True) if prefers_cudnn(device) else nullcontext()


def _layer_has_window(config: TransformerConfig, layer_number: int) -> bool:
    return config.window_size is not None and layer_has_window(config.window_attn_skip_freq, layer_number)


def _repeat_heads(x: torch.Tensor, cp: int) -> torch.Tensor:
    """Repeat key-value heads so that every context-parallel rank gets one: [s, b, g, d] -> [s, b, lcm(g, cp), d]."""
    repeats = math.lcm(x.shape[2], cp) // x.shape[2]
    return x if repeats == 1 else x.repeat_interleave(repeats, 2)
