"""What a model family is: a table of tensor names and a table of configuration fields, as plain data. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """

    ours: str
    theirs: tuple[str, ...]
    transform: str = "copy"
    when: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Field:
    """One line of a family's table of configuration fields.

    Attributes:
        ours: dotted key below ``model``.
        theirs: key in ``config.json``.
        codec: how the value changes between the two (`nemo_llm.families.codecs`).
        default: what their library takes where ``config.json`` lacks the key: a value, another key's name, ``4 x`` a
            key; ``REQUIRED`` where it must be there.
    """

    ours: str
    theirs: str
    codec: str = "same"
    default: Any = "REQUIRED"


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
        rotary_percent: key of ``config.json`` that says which share of a head is rotated, and its default; None where
            all of it is.
        ignored: endings of names in Hugging Face folders that hold buffers and no weights.
    """

    name: str
    model_type: str
    architecture: str
    constants: Mapping[str, Any]
    fields: tuple[Field, ...]
    tensors: tuple[Rule, ...]
    their_constants: Mapping[str, Any] = field(default_factory=dict)
    rotary_percent: tuple[str, float] | None = None
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def rules(self, model: Mapping[str, Any]) -> list[Rule]:
        """The lines that count for a model section."""
        return [rule for rule in self.tensors if all(_holds(condition, model) for condition in rule.when)]


@dataclass(frozen=True, slots=True)
class Link:
    """One slice of one of our tensors, and what it is made of.

    Attributes:
        key: our tensor.
        index: the slice's place on the leading axes: (), (layer,) or (layer, expert).
        axes: sizes of these axes.
        names: their tensors.
        transform: see `Rule`.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    names: tuple[str, ...]
    transform: str


def links(family: Family, model: Mapping[str, Any]) -> Iterator[Link]:
    """Every slice of every tensor of a model, in the order of the table, layer by layer."""
    rules = family.rules(model)
    layers, experts = model["num_layers"], (model["moe"] or {}).get("num_moe_experts", 0)
    yield from (_link(rule, (), ()) for rule in rules if not _in_layers(rule))
    for layer in range(layers):
        for rule in (rule for rule in rules if _in_layers(rule)):
            if "{expert}" in rule.theirs[0]:
                yield from (_link(rule, (layer, expert), (layers, experts)) for expert in range(experts))
            else:
                yield _link(rule, (layer,), (layers,))


def _in_layers(rule: Rule) -> bool:
    return "{layer}" in rule.theirs[0]


def _link(rule: Rule, index: tuple[int, ...], axes: tuple[int, ...]) -> Link:
    numbers = dict(zip(("layer", "expert"), index, strict=False))
    names = tuple(name.format(**numbers) for name in rule.theirs)
    return Link(rule.ours, index, axes, names, rule.transform)


def _holds(condition: str, model: Mapping[str, Any]) -> bool:
    name, equals, value = condition.removeprefix("not ").partition("=")
    if equals:
        return bool(model[name] == value)
    return bool(model[name]) != condition.startswith("not ")
