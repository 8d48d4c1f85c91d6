"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor as the code on a GPU keeps them.

Attention stores no matrix of scores where a kernel does without (arXiv:2205.14135); norms keep their input, linear
layers theirs. tests/planner holds the sums beside a real layer on a CPU and beside the rows that were measured on GPUs.
Letters: ``n`` tokens of a micro-batch on one context rank, ``h`` hidden size. Sequence parallelism divides what TP
leaves whole (arXiv:2205.05198).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from nemo_llm.config.checks.code_paths import (
    keeps_tokens_here,
    keys_of_own_layers,
    layer_has_window,
    splits_qkv,
    used_window,
    why_no_flex,
    why_not_grouped,
)
from nemo_llm.config.sections.model import MlaConfig, MoeConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.planner.adapters import Linear, keeps_inputs, kept_bytes, linears
from nemo_llm.planner.parameters import count_layer, is_moe_layer

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Tokens at the experts of the busiest rank over the mean, while the router is not balanced yet: set by the one row that
# was measured with expert parallelism (docs/planner.md), not counted by itself.
BUSIEST_RANK = 1.5


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes of one layer and one micro-batch on one rank.

    Attributes:
        kept: what lies in memory from the layer's forward to its backward pass.
        recomputed: what is made again for the backward pass, and lies there for one layer at a time.
        in_flight: gradients in its backward pass, at their most, less what that pass has freed by then.
    """

    kept: float
    recomputed: float
    in_flight: float


def tokens_per_rank(setting: ModelSetting) -> float:
    """Tokens of a micro-batch that one context-parallel rank holds."""
    return setting.micro_batch_size * setting.seq_length / setting.parallelism.context_parallel_size


def boundary_bytes(setting: ModelSetting) -> float:
    """Bytes of one hidden state ``[n, h]`` as it passes from layer to layer (split under sequence parallelism)."""
    split = setting.parallelism.tensor_model_parallel_size if setting.parallelism.sequence_parallel else 1
    return tokens_per_rank(setting) * setting.model.hidden_size * DTYPE_BYTES[setting.precision.params_dtype] / split


def gathered_bytes(setting: ModelSetting) -> float:
    """Megatron's buffer for the inputs that sequence parallelism gathers before a product: one for all layers."""
    if not setting.parallelism.sequence_parallel:
        return 0.0
    return boundary_bytes(setting) * setting.parallelism.tensor_model_parallel_size


def uses_transformer_engine(setting: ModelSetting) -> bool:
    """Whether the layers are Transformer Engine's, on a GPU with the packages that are installed here."""
    if keys_of_own_layers(setting.model) or setting.model.transformer_impl == "torch":
        return False
    if setting.precision.fp8 is not None and setting.precision.fp8.fp8_recipe != "tensorwise":
        return True  # the torch backend has no other recipe
    return setting.model.transformer_impl == "transformer_engine" or find_spec("transformer_engine") is not None


def layer_activations(setting: ModelSetting, number: int, recomputed_in_full: bool) -> LayerActivations:
    """Activations of layer `number` (from 0); with full recomputation its input alone is kept."""
    tensors = layer_tensors(setting, number)
    everything = sum(tensors.values())
    in_flight = _gradients_in_flight(setting, number, tensors)
    if recomputed_in_full:
        hidden = boundary_bytes(setting)
        return LayerActivations(kept=hidden, recomputed=everything - hidden, in_flight=in_flight)
    dropped = sum(tensors[name] for name in _selectively_recomputed(setting, number))
    return LayerActivations(kept=everything - dropped, recomputed=dropped, in_flight=in_flight)


def layer_tensors(setting: ModelSetting, number: int) -> dict[str, float]:
    """Bytes by name of all that layer `number` keeps without recomputation."""
    model, hidden = setting.model, boundary_bytes(setting)
    tokens, element, tp = _sizes(setting)
    found = {linear.name.partition(f"layers.{number}.")[2]: linear for linear in linears(model, number)}
    inner, outer = _mlp_bytes(setting, model.ffn_hidden_size / tp, tokens, found.get("mlp.linear_fc2"))
    experts = 0.0
    read_by_mlp = _input_share(setting, found.get("mlp.linear_fc1"))
    if model.moe is not None and is_moe_layer(model, number):
        inner, outer, experts = _moe_bytes(setting, model.moe, found)
        shared = found.get("mlp.shared_experts.linear_fc1")
        # A router that is trained keeps what it reads.
        read_by_mlp = 1.0 if setting.peft is None else 0.0 if shared is None else _input_share(setting, shared)
    read_by_qkv = _input_share(setting, found.get("self_attention.linear_qkv"))
    return {
        "residual stream": (1 if model.parallel_residual else 2) * hidden,
        "normed inputs": 0.0 if model.norm_placement == "post" else hidden * (read_by_qkv + read_by_mlp),
        "inputs of norms behind": 0.0 if model.norm_placement == "pre" else 2 * hidden,
        "attention": _attention_bytes(setting, found.get("self_attention.linear_proj")),
        "scores": tokens * _score_bytes(setting, number),
        "MLP": inner,
        "input of the second matrix": outer,
        "experts' inputs": experts,
        "adapters": _adapter_bytes(setting, found.values()),
        "FP8 weights": _fp8_weight_bytes(setting, number),
        "dropout masks": 2 * hidden / element if model.hidden_dropout > 0 else 0.0,
    }


def _sizes(setting: ModelSetting) -> tuple[float, int, int]:
    """Tokens on this rank, bytes of an element, tensor-parallel size."""
    element = DTYPE_BYTES[setting.precision.params_dtype]
    return tokens_per_rank(setting), element, setting.parallelism.tensor_model_parallel_size


def _input_share(setting: ModelSetting, linear: Linear | None) -> float:
    """Bytes that a linear layer keeps of each element of its inputs, as a share of the element's size.

    A frozen layer keeps none, but for its adapter; FP8 keeps one byte. None stands for what is always kept whole.
    """
    if linear is None:
        return 1.0
    own = 0.0 if setting.peft is not None else 1.0
    if setting.precision.fp8 is not None:
        own = 1.0 / DTYPE_BYTES[setting.precision.params_dtype]
    return own + (1.0 if keeps_inputs(setting, linear) else 0.0)


def _attention_bytes(setting: ModelSetting, projection: Linear | None) -> float:
    """Queries, keys, values and output on their way through attention, and tables of angles."""
    model, parallel = setting.model, setting.parallelism
    tokens, element, tp = _sizes(setting)
    if model.mla is not None:
        return _latent_attention_bytes(setting, model.mla)
    q = model.num_attention_heads / tp * model.head_dim
    kv = max(model.num_query_groups / tp, 1) * model.head_dim
    joint = q + 2 * kv  # the projection's output, which its parts are views of where no kernel splits it
    kept = joint * element
    if not splits_qkv(setting):
        rotated = model.position_embedding_type == "rope"
        copied = q if model.num_query_groups / tp > 1 else 0.0  # of queries, whose heads lie apart in the joint output
        if model.qk_layernorm and model.qk_layernorm_scope == "all":
            kept += (q + kv) * (4 + element + (element if rotated else 0))
        elif model.qk_layernorm:
            kept += (copied + q + kv) * element
        else:
            kept += (q + kv if rotated else copied) * element
    kept += q * element  # the output, which the projection behind reads too
    if setting.precision.fp8 is not None:
        kept += q * _input_share(setting, projection) * element
    if parallel.context_parallel_size > 1:
        kept += q * element  # the output again, as it lies for the projection
        if parallel.cp_comm_type == "all_gather":
            kept += 2 * kv * (parallel.context_parallel_size - 1) * element
    return tokens * kept + (_rotary_bytes(setting) if model.position_embedding_type == "rope" else 0.0)


def _score_bytes(setting: ModelSetting, number: int) -> float:
    """Bytes a token of what attention keeps about its scores: a log-sum-exp a head, or matrices of them."""
    model, length = setting.model, setting.seq_length
    _, element, tp = _sizes(setting)
    heads, groups = model.num_attention_heads / tp, max(model.num_query_groups / tp, 1)
    windowed = layer_has_window(model.window_attn_skip_freq, number + 1)
    masked = (windowed and used_window(model.window_size, length) is not None) or setting.reset_attention_mask
    if why_no_flex(setting) is None or uses_transformer_engine(setting) or not (masked or model.attn_logit_softcapping):
        return heads * 4
    if model.attn_logit_softcapping is not None:  # tanh and softmax in float32, weights; keys and values for all heads
        return heads * length * (4 + 4 + element) + 2 * (heads - groups) * model.head_dim * element
    rows = 1 if setting.reset_attention_mask else setting.micro_batch_size  # that share a mask
    return heads * 4 + length * element / rows


def _latent_attention_bytes(setting: ModelSetting, mla: MlaConfig) -> float:
    """Latents before and behind their norm, whole on every TP rank; queries and keys with their rotated part, keys and
    values as they were projected together, and the output, split."""
    tokens, element, tp = _sizes(setting)
    turned, plain = mla.qk_pos_emb_head_dim, mla.qk_head_dim
    whole = 2 * (mla.kv_lora_rank + (mla.q_lora_rank or 0)) + turned
    per_head = 2 * (plain + turned) + (plain + mla.v_head_dim) + mla.v_head_dim
    return tokens * element * (whole + setting.model.num_attention_heads * per_head / tp)


def _rotary_bytes(setting: ModelSetting) -> float:
    """Cosines and sines, the same for every sample and whole on every TP rank: once in float32 by the kernel that
    splits and rotates, else for queries and for keys."""
    positions = setting.seq_length / setting.parallelism.context_parallel_size
    channels = setting.model.head_dim * setting.model.rotary_percent
    if splits_qkv(setting):
        return 2 * positions * channels * 4
    return 4 * positions * channels * DTYPE_BYTES[setting.precision.params_dtype]


def _mlp_bytes(setting: ModelSetting, width: float, tokens: float, second: Linear | None) -> tuple[float, float]:
    """Tensors of an MLP's inner width: up to the activation, and the second matrix's input.

    SwiGLU is one kernel, which keeps the first product alone; with another gate Megatron also keeps the activated half
    and a copy of the other.
    """
    model, element = setting.model, DTYPE_BYTES[setting.precision.params_dtype]
    kept = 1 if not model.gated_linear_unit else 2 if model.activation_func == "silu" else 4
    return tokens * width * kept * element, tokens * width * element * _input_share(setting, second)


def _moe_bytes(setting: ModelSetting, moe: MoeConfig, found: dict[str, Linear]) -> tuple[float, float, float]:
    """As `_mlp_bytes`, with the shared expert's, and the copies of tokens that the experts read, with router scores."""
    tokens, element, tp = _sizes(setting)
    routed = routed_tokens(setting, moe)
    inner, outer = _mlp_bytes(
        setting,
        moe.moe_ffn_hidden_size / setting.parallelism.expert_tp_size,
        routed,
        found.get("mlp.experts.0.linear_fc2"),
    )
    if setting.model.activation_func != "silu" or not setting.model.gated_linear_unit:
        inner += outer  # the activated product before the router's weights are multiplied in
    shared = (moe.moe_shared_expert_intermediate_size or 0) / tp
    more_inner, more_outer = _mlp_bytes(setting, shared, tokens, found.get("mlp.shared_experts.linear_fc2"))
    first = found.get("mlp.experts.0.linear_fc1")
    inputs = routed * setting.model.hidden_size * element * _input_share(setting, first)
    if _groups_experts(setting):
        outer = 0.0  # computed again in the backward pass, by the kernel that reads its inputs anyway
        if keeps_tokens_here(setting):
            inputs = 0.0  # the experts read the tokens themselves
    scores = tokens / tp * moe.num_moe_experts * 4 * 2
    return inner + more_inner, outer + more_outer, inputs + scores


def _groups_experts(setting: ModelSetting) -> bool:
    """Whether the experts of the torch layers are one product; adapters at experts undo that."""
    return why_not_grouped(setting) is None and not uses_transformer_engine(setting) and setting.peft is None


def routed_tokens(setting: ModelSetting, moe: MoeConfig) -> float:
    """Copies of tokens at the experts of one rank: of the busiest one where expert parallelism spreads them."""
    layout = setting.parallelism
    own_tokens = tokens_per_rank(setting) / layout.tensor_model_parallel_size  # TP splits the sequence here
    busiest = BUSIEST_RANK if layout.expert_model_parallel_size > 1 else 1.0
    return own_tokens * moe.moe_router_topk * layout.expert_tp_size * busiest


def _adapter_bytes(setting: ModelSetting, found: Iterable[Linear]) -> float:
    tokens, element, tp = _sizes(setting)
    total = 0.0
    for linear in found:
        if linear.experts and setting.model.moe is not None:
            # Each local expert has matrices of its own and a share of the tokens.
            local = linear.experts / setting.parallelism.expert_model_parallel_size
            routed = routed_tokens(setting, setting.model.moe)
            total += local * kept_bytes(setting, linear, routed / local, element, setting.parallelism.expert_tp_size)
        else:
            total += kept_bytes(setting, linear, tokens, element, tp)
    return total


def _fp8_weight_bytes(setting: ModelSetting, number: int) -> float:
    """The torch backend's transposed FP8 weights, which each micro-batch makes anew and keeps."""
    if setting.precision.fp8 is None or uses_transformer_engine(setting):
        return 0.0
    layer = count_layer(setting.model, is_moe_layer(setting.model, number))
    parallel = setting.parallelism
    experts = layer.experts / (parallel.expert_model_parallel_size * parallel.expert_tp_size)
    return layer.split / parallel.tensor_model_parallel_size + experts


def _gradients_in_flight(setting: ModelSetting, number: int, tensors: dict[str, float]) -> float:
    """At the MLP's activation: gradients of both its sides and of the residual stream, less the second matrix's input,
    which is free by then; or those of attention, when the whole MLP is free."""
    model, hidden = setting.model, boundary_bytes(setting)
    tokens, element, tp = _sizes(setting)
    if model.moe is not None and is_moe_layer(model, number):
        # Gradients of all experts' outputs and inputs; expert parallelism exchanges them, each time with a copy.
        copies = 2 if setting.parallelism.expert_model_parallel_size == 1 else 4
        columns: float = copies * model.hidden_size
        if _groups_experts(setting) and keeps_tokens_here(setting):
            # A copy of the tokens for each row, both gradients of the first product, the second one's input again.
            columns = model.hidden_size + 3 * model.moe.moe_ffn_hidden_size
        mlp = columns * routed_tokens(setting, model.moe) * element
    else:
        width = model.ffn_hidden_size / tp
        mlp = tokens * width * element * (3 if model.gated_linear_unit else 2) - tensors["input of the second matrix"]
    if model.attn_logit_softcapping is None or why_no_flex(setting) is None:
        return hidden + max(mlp, 0.0)
    scores = 3 * 4 * tokens * model.num_attention_heads / tp * setting.seq_length
    return hidden + max(mlp, scores - tensors["MLP"] - tensors["input of the second matrix"], 0.0)


def _selectively_recomputed(setting: ModelSetting, number: int) -> list[str]:
    """Names of the tensors that selective recomputation drops."""
    modules = setting.parallelism.recompute_modules
    if setting.parallelism.recompute_granularity != "selective":
        return []
    moe_layer = is_moe_layer(setting.model, number)
    dropped = {
        "core_attn": ["scores"],
        "layernorm": ["normed inputs"],
        "mlp": [] if moe_layer else ["MLP", "input of the second matrix"],
        "moe": ["MLP", "input of the second matrix", "experts' inputs"] if moe_layer else [],
        "moe_act": ["input of the second matrix"] if moe_layer else [],
    }
    return sorted({name for module in modules for name in dropped.get(module, [])})
