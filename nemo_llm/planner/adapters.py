"""What adapters cost (peft/): trained parameters of a rank, and what they keep for the backward pass of a layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nemo_llm.config.sections.model import ModelConfig
from nemo_llm.config.sections.model_setting import ModelSetting
from nemo_llm.config.sections.peft import LinearMethod, LoraConfig, PeftMethod
from nemo_llm.parallel.layout import ParallelLayout
from nemo_llm.planner.parameters import is_moe_layer


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers of one transformer layer that have the same name but for the number of their expert.

    Attributes:
        name: dotted, as patterns of `peft.target_modules` see it.
        inputs: features of the whole layer.
        parts: name and output features of what other libraries have as layers of their own.
        column: whether tensor parallelism splits outputs rather than inputs.
        experts: how many there are, 0 for a layer that is no expert's.
    """

    name: str
    inputs: int
    parts: tuple[tuple[str, int], ...]
    column: bool
    experts: int = 0

    @property
    def leaf(self) -> str:
        """Last part of the name: ``linear_fc1``."""
        return self.name.rpartition(".")[2]

    @property
    def outputs(self) -> int:
        """Output features of all parts."""
        return sum(rows for _, rows in self.parts)


def linears(model: ModelConfig, number: int) -> Iterator[Linear]:
    """The linear layers of layer `number`; latent attention, which takes no adapters, has none here."""
    if model.mla is not None:
        return
    hidden, channels = model.hidden_size, model.head_dim
    q, kv = model.num_attention_heads * channels, model.num_query_groups * channels
    layer = f"decoder.layers.{number}."
    yield Linear(
        f"{layer}self_attention.linear_qkv", hidden, (("linear_q", q), ("linear_k", kv), ("linear_v", kv)), True
    )
    yield Linear(f"{layer}self_attention.linear_proj", q, (("linear_proj", hidden),), False)
    if not is_moe_layer(model, number) or model.moe is None:
        yield from _mlp_linears(model, f"{layer}mlp.", model.ffn_hidden_size, 0)
        return
    moe = model.moe
    if shared := moe.moe_shared_expert_intermediate_size:
        yield from _mlp_linears(model, f"{layer}mlp.shared_experts.", shared, 0)
    yield from _mlp_linears(model, f"{layer}mlp.experts.0.", moe.moe_ffn_hidden_size, moe.num_moe_experts)


def _mlp_linears(model: ModelConfig, prefix: str, width: int, experts: int) -> Iterator[Linear]:
    gated = (("linear_gate", width), ("linear_up", width))
    first = gated if model.gated_linear_unit else (("linear_fc1", width),)
    yield Linear(f"{prefix}linear_fc1", model.hidden_size, first, True, experts)
    yield Linear(f"{prefix}linear_fc2", width, (("linear_fc2", model.hidden_size),), False, experts)


def adapted_parts(peft: PeftMethod, linear: Linear) -> dict[str, int]:
    """Rank by name of the parts that a pattern names, as peft/attach.py chooses them; one expert stands for all.

    The rank is 1 for methods that have none.
    """
    if not isinstance(peft, LinearMethod):
        return {}
    usual, others = (peft.rank, peft.ranks) if isinstance(peft, LoraConfig) else (1, {})
    found = {}
    for part, _ in linear.parts:
        names = (linear.name, f"{linear.name.rpartition('.')[0]}.{part}")
        if any(_matches(pattern, name) for pattern in peft.target_modules for name in names):
            ranks = [rank for pattern, rank in others.items() if any(_matches(pattern, name) for name in names)]
            found[part] = ranks[-1] if ranks else usual
    return found


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def trained_parameters(setting: ModelSetting, layout: ParallelLayout, layers: tuple[int, ...]) -> float:
    """Parameters of the adapters on one rank that holds these layers; virtual tokens are counted on every rank."""
    peft, model = setting.peft, setting.model
    if peft is None:
        return 0.0
    total = float(len(model.head) * model.hidden_size) if model.head is not None else 0.0
    if peft.kind == "prompt_tuning" or peft.kind == "p_tuning":
        vectors = peft.num_virtual_tokens * model.hidden_size
        if peft.kind == "prompt_tuning":
            return total + vectors
        width = peft.encoder_hidden_size or model.hidden_size  # of three linear layers with biases
        return total + vectors + width * (2 * model.hidden_size + width) + 2 * width + model.hidden_size
    for number in layers:
        for linear in linears(model, number):
            split = layout.etp if linear.experts else layout.tp
            total += _parameters(peft, linear, split) * max(1.0, linear.experts / layout.ep)
    return total


def _parameters(peft: PeftMethod, linear: Linear, split: int) -> float:
    """Of the adapter on one linear layer, on a rank that holds ``1 / split`` of the layer."""
    ranks, rows = adapted_parts(peft, linear), dict(linear.parts)
    if not ranks:
        return 0.0
    outputs = sum(rows[part] for part in ranks) / (split if linear.column else 1)
    inputs = linear.inputs / (1 if linear.column else split)
    if peft.kind == "ia3":
        return inputs if linear.leaf == "linear_fc2" else outputs
    if peft.kind == "adapter":
        return peft.bottleneck_size * (2 * linear.outputs + 1) + linear.outputs
    low = sum(rank * (inputs + rows[part] / (split if linear.column else 1)) for part, rank in ranks.items())
    return low + (outputs if peft.kind == "dora" else 0.0)


def keeps_inputs(setting: ModelSetting, linear: Linear) -> bool:
    """Whether the adapter on this layer needs the layer's inputs in the backward pass."""
    if setting.peft is None or not adapted_parts(setting.peft, linear):
        return False
    peft = setting.peft
    return isinstance(peft, LoraConfig) or (peft.kind == "ia3" and linear.leaf == "linear_fc2")


def kept_bytes(setting: ModelSetting, linear: Linear, tokens: float, element: int, split: int) -> float:
    """Bytes that the adapter keeps beside the layer's inputs, for ``tokens`` tokens on a rank with ``1 / split``."""
    peft = setting.peft
    ranks = {} if peft is None else adapted_parts(peft, linear)
    if peft is None or not ranks:
        return 0.0
    outputs = linear.outputs / (split if linear.column else 1)
    inputs = linear.inputs / (1 if linear.column else split)
    if peft.kind == "ia3":
        return tokens * element * (inputs if linear.leaf == "linear_fc2" else outputs)
    if peft.kind == "adapter":
        return tokens * element * (outputs + 2 * peft.bottleneck_size)
    assert isinstance(peft, LoraConfig)
    rank = sum(ranks.values())
    # The parts' matrices put together: B always, scaled; A where there are several parts.
    kept = element * rank * (outputs + (inputs if len(ranks) > 1 else 0.0)) + tokens * element * rank
    if peft.dropout > 0.0:
        kept += tokens * inputs * (element + 1)
    return kept + (tokens * element * outputs if peft.kind == "dora" else 0.0)
