"""What a model family is: a table of tensor names and a table of configuration fields, as plain data. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_llm.config.sections.arithmetic import is_mixture


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table of tensors.

    Attributes:
        ours: key in our checkpoint. Megatron stacks layers, and experts within a layer, as leading axes of one tensor.
        theirs: names in the Hugging Face folder that make up one slice of it; ``{layer}`` and ``{expert}`` are
            numbers from 0.
        transform: what makes one of the other (`nemo_llm.convert.transforms`).
        when: fields of the model section, ``not <field>`` or ``<field>=<text>``, that must all hold for the line to
            count.
        layers: ``moe`` or ``dense`` where the line is of such layers alone.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: str = "copy"
    when: tuple[str, ...] = ()
    layers: str | None = None


REQUIRED = object()
"""In place of a value that ``config.json`` must give."""


@dataclass(frozen=True, slots=True)
class Key:
    """The value of another key of ``config.json``, times a factor."""

    name: str
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Field:
    """One line of a family's table of configuration fields.

    Attributes:
        ours: dotted key below ``model``.
        theirs: key in ``config.json``.
        codec: how the value changes between the two (`nemo_llm.families.codecs`).
        default: what transformers takes where ``config.json`` lacks the key: a value or a `Key`; `REQUIRED` where we
            refuse to guess. The tests compare each with transformers' own configuration class.
        null: what transformers takes where the key is there and null.
    """

    ours: str
    theirs: str
    codec: str = "same"
    default: Any = REQUIRED
    null: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: for reports.
        model_type: Hugging Face's name, as ``config.json`` gives it.
        architecture: the class in ``architectures`` of ``config.json``.
        constants: keys below ``model`` that are the same for all members.
        fields: keys that ``config.json`` decides.
        tensors: the table of names.
        their_constants: keys of ``config.json`` that can have this value alone; anything else is refused.
        rotary_base: key of ``config.json`` for the base of the rotary wavelengths, and its default.
        rotary_percent: key of ``config.json`` that says which share of a head is rotated, and its default; None where
            all of it is.
        ignored: endings of names in Hugging Face folders that hold buffers and no weights.
        products: names in `fields` that ``config.json`` does not have: the product of two of its keys, the second of
            which is a field too.
    """

    name: str
    model_type: str
    architecture: str
    constants: Mapping[str, Any]
    fields: tuple[Field, ...]
    tensors: tuple[Rule, ...]
    their_constants: Mapping[str, Any] = field(default_factory=dict)
    rotary_base: tuple[str, float] = ("rope_theta", 10000.0)
    rotary_percent: tuple[str, float] | None = None
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    products: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def rules(self, model: Mapping[str, Any]) -> list[Rule]:
        """The lines that count for a model section."""
        return [rule for rule in self.tensors if all(_holds(condition, model) for condition in rule.when)]


@dataclass(frozen=True, slots=True)
class Link:
    """One slice of one of our tensors, and what it is made of.

    Attributes:
        key: our tensor.
        index: the slice's place on the leading axes: (), (layer,), (layer, expert) or, where layers are not stacked,
            (expert,).
        axes: sizes of these axes.
        names: their tensors.
        transform: see `Rule`.
        place: line of the table, layer and expert, the latter two None outside of such.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    names: tuple[str, ...]
    transform: str
    place: tuple[str, int | None, int | None]


def links(family: Family, model: Mapping[str, Any]) -> Iterator[Link]:
    """Every slice of every tensor of a model, in the order of the table, layer by layer."""
    rules = family.rules(model)
    experts = (model["moe"] or {}).get("num_moe_experts", 0)
    yield from (_link(rule, model, None, None) for rule in rules if not _in_layers(rule))
    for layer in range(model["num_layers"]):
        kind = "moe" if has_experts(model, layer) else "dense"
        for rule in (rule for rule in rules if _in_layers(rule) and rule.layers in (None, kind)):
            if "{expert}" in rule.theirs[0]:
                yield from (_link(rule, model, layer, expert) for expert in range(experts))
            else:
                yield _link(rule, model, layer, None)


def has_experts(model: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer, numbered from 0, is a mixture."""
    moe = model["moe"]
    return bool(moe) and is_mixture(layer, moe.get("moe_first_k_dense_replace"), moe["moe_layer_freq"])


def _in_layers(rule: Rule) -> bool:
    return "{layer}" in rule.theirs[0]


def _link(rule: Rule, model: Mapping[str, Any], layer: int | None, expert: int | None) -> Link:
    names = tuple(name.format(layer=layer, expert=expert) for name in rule.theirs)
    place = (rule.ours, layer, expert)
    moe = model["moe"] or {}
    key = rule.ours
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    if expert is not None:
        index, axes = (expert,), (moe["num_moe_experts"],)
    if layer is not None and (moe.get("moe_first_k_dense_replace") or moe.get("moe_layer_freq", 1) > 1):
        key = key.replace("decoder.layers.", f"decoder.layers.{layer}.")  # Megatron stacks layers that are alike
    elif layer is not None:
        index, axes = (layer, *index), (model["num_layers"], *axes)
    return Link(key, index, axes, names, rule.transform, place)


def _holds(condition: str, model: Mapping[str, Any]) -> bool:
    name, equals, value = condition.removeprefix("not ").partition("=")
    found: Any = model
    for part in name.split("."):
        found = found[part]
    if equals:
        return bool(found == value)
    return bool(found) != condition.startswith("not ")
